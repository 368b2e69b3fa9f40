# Finds nvcc and enables the language CUDA, setting _have_cuda; without it, fails if
# JAX_CONVGRAD_CUDA is ON. Looked for: PATH, CUDA_HOME and CUDA_PATH; and, where a GPU is
# visible or the module is asked for, a toolkit's usual place and NVIDIA's wheels. Not
# find_package(CUDAToolkit): it wants an unversioned libcudart.so, which the wheels lack.

# Searched anew at every call, since a build folder is kept and another nvcc may be there by
# now. But one whose language was enabled is CMake's to keep.
unset(_nvcc)
if(NOT "$ENV{CUDACXX}" STREQUAL "")
  set(_nvcc "$ENV{CUDACXX}")
  set(_named "CUDACXX=${_nvcc}")
elseif(CMAKE_CUDA_COMPILER)
  set(_nvcc "${CMAKE_CUDA_COMPILER}")
  set(_named "${_nvcc}, with which ${CMAKE_BINARY_DIR} was configured,")
else()
  find_program(_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH NO_CACHE)
  include(cmake/VisibleGpus.cmake)
  if(NOT _nvcc AND (JAX_CONVGRAD_CUDA STREQUAL "ON" OR NOT CONVGRAD_VISIBLE_GPUS STREQUAL ""))
    execute_process(
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/find_in_package.py" nvidia cu13/bin
      OUTPUT_VARIABLE _wheel_bin OUTPUT_STRIP_TRAILING_WHITESPACE)
    find_program(_nvcc nvcc PATHS /usr/local/cuda/bin ${_wheel_bin} NO_DEFAULT_PATH NO_CACHE)
  endif()
  set(_named "${_nvcc}")
endif()

# An nvcc that cannot work here, mostly because the host compiler is too new for it, must
# not stop a build that would do without. CMake's check_language finds that out too, by a
# project of its own, which takes several seconds.
if(_nvcc)
  set(_empty "${CMAKE_BINARY_DIR}/empty.cu")
  file(WRITE "${_empty}" "")
  execute_process(
    COMMAND "${_nvcc}" -E "${_empty}"
    RESULT_VARIABLE _status OUTPUT_QUIET ERROR_VARIABLE _nvcc_error ERROR_STRIP_TRAILING_WHITESPACE)
  if(_status EQUAL 0)
    set(_have_cuda ON)
  else()
    set(_nvcc_trouble "${_named} cannot compile here (${_status}) ${_nvcc_error}")
    message(STATUS "${_nvcc_trouble}")
  endif()
endif()

if(_have_cuda)
  set(ENV{CUDACXX} "${_nvcc}")
  get_filename_component(_root "${_nvcc}" REALPATH)
  get_filename_component(_root "${_root}" DIRECTORY)
  get_filename_component(_root "${_root}" DIRECTORY)
  # The 13.0 wheels keep their libraries in lib, while their nvcc looks in lib64.
  if(EXISTS "${_root}/lib/libcudart_static.a" AND NOT EXISTS "${_root}/lib64")
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${_root}/lib")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # CudaArchitectures.cmake says what is compiled for
  enable_language(CUDA)
elseif(JAX_CONVGRAD_CUDA STREQUAL "ON")
  message(FATAL_ERROR "JAX_CONVGRAD_CUDA=ON but no working CUDA compiler was found: put nvcc on PATH, "
    "set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'. ${_nvcc_trouble}")
endif()
