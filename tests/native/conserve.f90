! Conserves the flux of a file: conserve BOUNDARIES IN OUT. IN holds nx ny nz, the spacing, the voxels and the flux.
program conserve
  use, intrinsic :: ieee_arithmetic, only: ieee_is_nan
  use, intrinsic :: iso_c_binding, only: c_double, c_int64_t, c_int8_t
  use latentphys_finish, only: finish
  implicit none

  character(256) :: boundaries, path
  integer(c_int64_t) :: n(3)
  real(c_double) :: spacing(3)
  integer(c_int8_t), allocatable :: solid(:, :, :)
  real(c_double), allocatable :: flux(:, :, :, :), given(:, :, :, :)
  type(finish) :: exact
  integer :: unit, num_iterations, status

  call get_command_argument(1, boundaries)
  call get_command_argument(2, path)
  open (newunit=unit, file=path, access="stream", form="unformatted", status="old")
  read (unit) n, spacing
  allocate (solid(n(3), n(2), n(1)), flux(n(3), n(2), n(1), 3))
  read (unit) solid, flux
  close (unit)

  call exact%conserve(flux, status=status)
  print "(a, i0, 2a)", "before create: ", status, " ", exact%error
  print "(a, l1)", "net before create: ", ieee_is_nan(exact%net_flux_max(flux))
  call exact%create(spacing, "periodic", solid, status)
  print "(a, i0, 2a)", "five words short: ", status, " ", exact%error
  call exact%create(spacing, trim(boundaries), solid, status)
  print "(a, i0, a, l1)", "create: ", status, " ", allocated(exact%error)
  call exact%set(2.0_c_double, 10, .false., status)
  print "(a, i0, 2a)", "set: ", status, " ", exact%error
  allocate (given, source=flux)
  num_iterations = -1
  call exact%conserve(flux(:, :, :, :2), num_iterations, status)
  print "(a, i0, 3a, i0, a, l1)", "other shape: ", status, " ", exact%error, " ", num_iterations, " ", &
    .not. any(abs(flux - given) > 0)
  call exact%set(1e-13_c_double, 1000, .true.)
  call exact%conserve(flux, num_iterations)
  print "(a, i0)", "iterations: ", num_iterations
  print "(a, es9.2)", "net: ", exact%net_flux_max(flux)
  call exact%destroy()

  call get_command_argument(3, path)
  open (newunit=unit, file=path, access="stream", form="unformatted", status="replace")
  write (unit) flux
  close (unit)
end program conserve
