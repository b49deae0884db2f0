! The FP64 finish for Fortran: compile this file and finish.cpp, and link both.
!
! Arrays lie in memory as in C, so their axes are in the opposite order: flux(nz, ny, nx, 3) [m³/s], solid(nz, ny, nx).
module latentphys_finish
  use, intrinsic :: iso_c_binding, only: c_associated, c_char, c_double, c_f_pointer, c_int, c_int64_t, c_int8_t, &
                                         c_null_char, c_null_ptr, c_ptr, c_size_t
  implicit none
  private
  public :: finish

  character(*), parameter :: other_shape = "Expected a flux of the shape (nz, ny, nx, 3) of the voxels, got another."

  ! An error sets `status` to 1 and `error` to its text; where no status is asked for it stops the program.
  type :: finish
    character(:), allocatable, public :: error
    type(c_ptr), private :: handle = c_null_ptr
    integer, private :: extent(4) = 0
  contains
    procedure, public :: create
    procedure, public :: set
    procedure, public :: conserve
    procedure, public :: net_flux_max
    procedure, public :: destroy
    procedure, private :: report
  end type finish

  interface
    function create_c(shape, spacing, boundaries, solid) result(handle) bind(c, name="latentphys_finish_create")
      import :: c_char, c_double, c_int64_t, c_int8_t, c_ptr
      integer(c_int64_t), intent(in) :: shape(3)
      real(c_double), intent(in) :: spacing(3)
      character(kind=c_char), intent(in) :: boundaries(*)
      integer(c_int8_t), intent(in) :: solid(*)
      type(c_ptr) :: handle
    end function create_c

    subroutine destroy_c(handle) bind(c, name="latentphys_finish_destroy")
      import :: c_ptr
      type(c_ptr), value :: handle
    end subroutine destroy_c

    function set_c(handle, tolerance, max_iterations, warm_start) result(failed) bind(c, name="latentphys_finish_set")
      import :: c_double, c_int, c_ptr
      type(c_ptr), value :: handle
      real(c_double), value :: tolerance
      integer(c_int), value :: max_iterations, warm_start
      integer(c_int) :: failed
    end function set_c

    function conserve_c(handle, flux, num_iterations) result(failed) bind(c, name="latentphys_finish_conserve")
      import :: c_double, c_int, c_ptr
      type(c_ptr), value :: handle
      real(c_double), intent(inout) :: flux(*)
      integer(c_int), intent(out) :: num_iterations
      integer(c_int) :: failed
    end function conserve_c

    function net_flux_max_c(handle, flux) result(largest) bind(c, name="latentphys_finish_net_flux_max")
      import :: c_double, c_ptr
      type(c_ptr), value :: handle
      real(c_double), intent(in) :: flux(*)
      real(c_double) :: largest
    end function net_flux_max_c

    function error_c() result(text) bind(c, name="latentphys_error")
      import :: c_ptr
      type(c_ptr) :: text
    end function error_c

    function strlen(text) result(length) bind(c)
      import :: c_ptr, c_size_t
      type(c_ptr), value :: text
      integer(c_size_t) :: length
    end function strlen
  end interface

contains

  ! boundaries: six words x- x+ y- y+ z- z+ with blanks between them; spacing (dx, dy, dz) [m]; solid not 0 where solid.
  subroutine create(self, spacing, boundaries, solid, status)
    class(finish), intent(inout) :: self
    real(c_double), intent(in) :: spacing(3)
    character(*), intent(in) :: boundaries
    integer(c_int8_t), contiguous, intent(in) :: solid(:, :, :)
    integer, intent(out), optional :: status

    call self%destroy()
    self%handle = create_c(int([size(solid, 3), size(solid, 2), size(solid, 1)], c_int64_t), spacing, &
                           boundaries//c_null_char, solid)
    if (c_associated(self%handle)) self%extent = [shape(solid), 3]
    call self%report(.not. c_associated(self%handle), status)
  end subroutine create

  ! See latentphys_finish_set in finish.h.
  subroutine set(self, tolerance, max_iterations, warm_start, status)
    class(finish), intent(inout) :: self
    real(c_double), intent(in) :: tolerance
    integer, intent(in) :: max_iterations
    logical, intent(in) :: warm_start
    integer, intent(out), optional :: status
    integer(c_int) :: failed

    failed = set_c(self%handle, tolerance, int(max_iterations, c_int), merge(1_c_int, 0_c_int, warm_start))
    call self%report(failed /= 0, status)
  end subroutine set

  ! Replace a flux by the nearest one whose net is 0.0 in every cell.
  subroutine conserve(self, flux, num_iterations, status)
    class(finish), intent(inout) :: self
    real(c_double), contiguous, intent(inout) :: flux(:, :, :, :)
    integer, intent(out), optional :: num_iterations, status
    integer(c_int) :: failed, iterations

    if (present(num_iterations)) num_iterations = 0
    if (c_associated(self%handle) .and. any(shape(flux) /= self%extent)) then
      call self%report(.true., status, other_shape)
      return
    end if
    iterations = 0
    failed = conserve_c(self%handle, flux, iterations)
    if (present(num_iterations)) num_iterations = iterations
    call self%report(failed /= 0, status)
  end subroutine conserve

  ! Largest |net flux| of a cell [m³/s]; NaN where there is one, or before create. Another shape stops the program.
  function net_flux_max(self, flux) result(largest)
    class(finish), intent(in) :: self
    real(c_double), contiguous, intent(in) :: flux(:, :, :, :)
    real(c_double) :: largest

    if (c_associated(self%handle) .and. any(shape(flux) /= self%extent)) error stop other_shape
    largest = net_flux_max_c(self%handle, flux)
  end function net_flux_max

  subroutine destroy(self)
    class(finish), intent(inout) :: self

    if (c_associated(self%handle)) call destroy_c(self%handle)
    self%handle = c_null_ptr
    self%extent = 0
  end subroutine destroy

  ! reason: why it failed; by default what the C interface says of its last call.
  subroutine report(self, failed, status, reason)
    class(finish), intent(inout) :: self
    logical, intent(in) :: failed
    integer, intent(out), optional :: status
    character(*), intent(in), optional :: reason
    character(:), allocatable :: text

    if (present(status)) status = merge(1, 0, failed)
    if (allocated(self%error)) deallocate (self%error)
    if (.not. failed) return
    if (present(reason)) then
      text = reason
    else
      text = last_error()
    end if
    if (.not. present(status)) error stop text
    self%error = text
  end subroutine report

  function last_error() result(text)
    character(:), allocatable :: text
    character(kind=c_char), pointer :: letters(:)
    type(c_ptr) :: address
    integer :: i

    address = error_c()
    call c_f_pointer(address, letters, [strlen(address)])
    allocate (character(size(letters)) :: text)
    do i = 1, size(letters)
      text(i:i) = letters(i)
    end do
  end function last_error

end module latentphys_finish
