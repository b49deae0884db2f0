! Reads the folder of an exported model: the lines of artefact.txt and the arrays of arrays.safetensors.
module artefact
  use, intrinsic :: iso_c_binding, only: c_double, c_int64_t, c_int8_t
  implicit none
  private
  public :: fact, read_array

  interface read_array
    module procedure read_numbers, read_voxels
  end interface read_array

contains

  ! What stands behind a key: `line = fact(folder, "grid.shape"); read (line, *) nx, ny, nz`.
  function fact(folder, key) result(text)
    character(*), intent(in) :: folder, key
    character(:), allocatable :: text
    character(1024) :: line
    integer :: unit, status

    open (newunit=unit, file=folder//"/artefact.txt", status="old", action="read")
    do
      read (unit, "(a)", iostat=status) line
      if (status /= 0) error stop "Expected a line '"//key//"' in artefact.txt, got none; export the model again."
      if (index(line, key//" ") == 1) exit
    end do
    close (unit)
    text = trim(line(len(key) + 2:))
  end function fact

  subroutine read_numbers(folder, name, values)
    character(*), intent(in) :: folder, name
    real(c_double), intent(out) :: values(:)
    integer :: unit

    unit = opened(folder, name, 8*size(values, kind=c_int64_t))
    read (unit) values
    close (unit)
  end subroutine read_numbers

  subroutine read_voxels(folder, name, values)
    character(*), intent(in) :: folder, name
    integer(c_int8_t), intent(out) :: values(:)
    integer :: unit

    unit = opened(folder, name, size(values, kind=c_int64_t))
    read (unit) values
    close (unit)
  end subroutine read_voxels

  ! The file, opened where an array of so many bytes begins: behind a JSON header and its length.
  function opened(folder, name, num_bytes) result(unit)
    character(*), intent(in) :: folder, name
    integer(c_int64_t), intent(in) :: num_bytes
    integer(c_int64_t) :: length, offsets(2)
    character(:), allocatable :: header
    integer :: unit, at, last

    open (newunit=unit, file=folder//"/arrays.safetensors", access="stream", form="unformatted", status="old", action="read")
    read (unit) length
    allocate (character(length) :: header)
    read (unit) header
    at = index(header, '"'//name//'":')
    if (at == 0) error stop "Expected the array '"//name//"', got none; export the model again."
    header = header(at + index(header(at:), '"data_offsets":[') + 15:)
    last = index(header, "]") - 1
    read (header(:last), *) offsets
    if (offsets(2) - offsets(1) /= num_bytes) error stop "Expected another size of '"//name//"'; export the model again."
    read (unit, pos=9 + length + offsets(1))
  end function opened

end module artefact
