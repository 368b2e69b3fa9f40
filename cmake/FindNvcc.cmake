# Points check_language(CUDA) at an nvcc: PATH, CUDA_HOME or CUDA_PATH, a toolkit's
# usual place, then NVIDIA's wheels. Not find_package(CUDAToolkit): it wants an
# unversioned libcudart.so, which the wheels lack.

if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # a cached NOTFOUND would outlive its cause
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/find_in_package.py" nvidia cu13/bin
    OUTPUT_VARIABLE _wheel_bin OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(JAX_CONVGRAD_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
  find_program(JAX_CONVGRAD_NVCC nvcc PATHS /usr/local/cuda/bin ${_wheel_bin} NO_DEFAULT_PATH)
  if(JAX_CONVGRAD_NVCC)
    # Through the environment, so that check_language still tries it.
    set(ENV{CUDACXX} "${JAX_CONVGRAD_NVCC}")
    get_filename_component(_root "${JAX_CONVGRAD_NVCC}" REALPATH)
    get_filename_component(_root "${_root}" DIRECTORY)
    get_filename_component(_root "${_root}" DIRECTORY)
    # The 13.0 wheels keep their libraries in lib, while their nvcc looks in lib64.
    if(EXISTS "${_root}/lib/libcudart_static.a" AND NOT EXISTS "${_root}/lib64")
      set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${_root}/lib")
    endif()
  endif()
endif()

# Machine code for the data-centre and consumer chips in use, and PTX for what follows.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100-real 120-real 80-virtual)
endif()
