! Steps a model exported to TorchScript in a loop, as a solver would: surrogate FOLDER NUM_STEPS OUT.
!
! PyTorch's arrays are in C order. So each array is one piece of memory with two names: a solver's in Fortran order,
! flux(nz, ny, nx, 3), and PyTorch's, (1, f, nx, ny, nz) with its last index fastest, which is what `layout` says.
program surrogate
  use, intrinsic :: iso_c_binding, only: c_double, c_float, c_int8_t
  use artefact, only: fact, read_array
  use ftorch, only: torch_kCPU, torch_model, torch_model_forward, torch_model_load, torch_tensor, torch_tensor_from_array
  use latentphys_finish, only: finish
  implicit none

  character(1024) :: argument
  character(:), allocatable :: folder, line, out
  character(32) :: name, kind, constraint, number
  integer :: num_steps, n, nx, ny, nz, num_cells, num_channels, num_parameters, p, parameter_size
  integer :: latent_shape(4)
  real(c_double) :: spacing(3)
  integer(c_int8_t), allocatable, target :: voxels(:)
  real(c_double), allocatable, target :: memory(:), now(:)
  real(c_float), allocatable, target :: latent(:), next(:)
  integer(c_int8_t), pointer, contiguous :: solid(:, :, :)
  real(c_double), pointer, contiguous :: flux(:, :, :, :), fields(:, :, :, :, :), parameters(:, :)
  real(c_float), pointer, contiguous :: latent_view(:, :, :, :, :), next_view(:, :, :, :, :)
  type(torch_model) :: encode, step, decode
  type(torch_tensor) :: state(1), code(1), step_inputs(3), stepped(1)
  type(finish) :: exact
  integer :: unit

  if (command_argument_count() /= 3) error stop "Usage: surrogate FOLDER NUM_STEPS OUT"
  call get_command_argument(1, argument)
  folder = trim(argument)
  call get_command_argument(2, argument)
  read (argument, *) num_steps
  call get_command_argument(3, argument)
  out = trim(argument)

  if (fact(folder, "schema") /= "latentphys.artefact/1") &
    error stop "Expected an artefact of schema latentphys.artefact/1; export the model again."
  if (fact(folder, "format") /= "torchscript") error stop "Expected a model exported with --to torchscript."
  line = fact(folder, "grid.shape")
  read (line, *) nx, ny, nz
  line = fact(folder, "grid.spacing")
  read (line, *) spacing
  line = fact(folder, "latent.shape")
  read (line, *) latent_shape
  line = fact(folder, "fields")
  read (line, *) n
  line = fact(folder, "fields.0")
  read (line, *) name, kind, constraint
  if (n /= 1 .or. constraint /= "solenoidal") error stop "Expected a model of one solenoidal flux."
  line = fact(folder, "parameters")
  read (line, *) n
  num_parameters = 0
  do p = 0, n - 1
    write (number, "(i0)") p
    line = fact(folder, "parameters."//trim(number))
    read (line, *) name, parameter_size
    num_parameters = num_parameters + parameter_size
  end do
  num_cells = nx*ny*nz
  num_channels = 3

  allocate (voxels(num_cells), memory(num_channels*num_cells), now(num_parameters))
  allocate (latent(product(latent_shape)), next(product(latent_shape)))
  call read_array(folder, "solid", voxels)
  call read_array(folder, "test.fields", memory)
  call read_array(folder, "test.now", now)
  solid(1:nz, 1:ny, 1:nx) => voxels
  flux(1:nz, 1:ny, 1:nx, 1:3) => memory
  fields(1:1, 1:num_channels, 1:nx, 1:ny, 1:nz) => memory
  parameters(1:1, 1:num_parameters) => now
  latent_view(1:1, 1:latent_shape(1), 1:latent_shape(2), 1:latent_shape(3), 1:latent_shape(4)) => latent
  next_view(1:1, 1:latent_shape(1), 1:latent_shape(2), 1:latent_shape(3), 1:latent_shape(4)) => next

  call exact%create(spacing, fact(folder, "grid.boundaries"), solid)
  call torch_model_load(encode, folder//"/encode.pt", torch_kCPU)
  call torch_model_load(step, folder//"/step.pt", torch_kCPU)
  call torch_model_load(decode, folder//"/decode.pt", torch_kCPU)
  call torch_tensor_from_array(state(1), fields, [5, 4, 3, 2, 1], torch_kCPU)
  call torch_tensor_from_array(code(1), latent_view, [5, 4, 3, 2, 1], torch_kCPU)
  call torch_tensor_from_array(step_inputs(1), latent_view, [5, 4, 3, 2, 1], torch_kCPU)
  call torch_tensor_from_array(step_inputs(2), parameters, [2, 1], torch_kCPU)
  call torch_tensor_from_array(step_inputs(3), parameters, [2, 1], torch_kCPU)
  call torch_tensor_from_array(stepped(1), next_view, [5, 4, 3, 2, 1], torch_kCPU)

  call torch_model_forward(encode, state, code)
  do n = 1, num_steps
    call torch_model_forward(step, step_inputs, stepped)
    latent = next
    call torch_model_forward(decode, code, state)
    call exact%conserve(flux)
    print "(a, i0, a, es23.16, a, es9.2)", "step ", n, " energy ", kinetic_energy(flux, spacing), " net ", &
      exact%net_flux_max(flux)
  end do
  call exact%destroy()

  open (newunit=unit, file=out, access="stream", form="unformatted", status="replace", action="write")
  write (unit) flux
  close (unit)

contains

  ! ½⟨u·u⟩ on the low faces [m²/s²].
  function kinetic_energy(f, h) result(energy)
    real(c_double), intent(in) :: f(:, :, :, :), h(3)
    real(c_double) :: energy, area(3)
    integer :: axis

    area = product(h)/h
    energy = 0
    do axis = 1, 3
      energy = energy + 0.5_c_double*sum((f(:, :, :, axis)/area(axis))**2)/(size(f)/3)
    end do
  end function kinetic_energy

end program surrogate
