# What the CUDA kernels are compiled for, by JAX_CONVGRAD_CUDA_ARCHITECTURES:
#
#   native    the GPUs that are visible
#   all       the data-centre and consumer chips in use, and PTX for what follows
#   ptx       PTX alone, which the driver translates when a kernel is first used
#   80,90     machine code for these compute capabilities, times ten
#   generic   PTX of the two kernels that take any problem, direct and tiled; the
#             specialised ones take minutes to compile
#   (empty)   native if a GPU is visible, else generic
#
# Sets CONVGRAD_GENCODE, nvcc's options for the kernels that any GPU of capability 8.0
# runs; CONVGRAD_HOPPER_GENCODE, those for what exists on capability 9.0 alone, empty if
# that is not compiled for; CONVGRAD_CUDA_CODE, all code in a module; and
# CONVGRAD_CUDA_DEFINITIONS and CONVGRAD_CUDA_SUMMARY.

set(_lowest 80)
set(_all 80 90 100 120 ptx)

include("${CMAKE_CURRENT_LIST_DIR}/VisibleGpus.cmake")
execute_process(
  COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code
  OUTPUT_VARIABLE _known OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE "\n" ";" _known "${_known}")

set(_wanted "${JAX_CONVGRAD_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "^[, ]+|[, ]+$" "" _wanted "${_wanted}")
string(REGEX REPLACE "[, ]+" ";" _wanted "${_wanted}")
set(_hint "JAX_CONVGRAD_CUDA_ARCHITECTURES=all, or a list such as 80,90, compiles for others")
if(_wanted STREQUAL "native" AND CONVGRAD_VISIBLE_GPUS STREQUAL "")
  message(FATAL_ERROR "JAX_CONVGRAD_CUDA_ARCHITECTURES=native but no GPU is visible here: ${_hint}")
endif()
if(_wanted STREQUAL "")
  set(_wanted native)
  if(CONVGRAD_VISIBLE_GPUS STREQUAL "")
    set(_wanted generic)
    set(_why "as no GPU is visible; ${_hint}")
  endif()
endif()
if(_wanted STREQUAL "native")
  set(_wanted "")
  set(_why "as in this machine; ${_hint}")
  set(_otherwise generic)
  foreach(capability IN LISTS CONVGRAD_VISIBLE_GPUS)
    if(capability LESS _lowest)
      message(STATUS "a GPU of compute capability ${capability} (times ten) is below ${_lowest}: lax will run on it")
    elseif("sm_${capability}" IN_LIST _known)
      list(APPEND _wanted ${capability})
    else()
      message(STATUS "this nvcc has no machine code for compute capability ${capability} (times ten): PTX instead")
      set(_otherwise ptx)
    endif()
  endforeach()
  if(NOT _wanted)
    set(_wanted ${_otherwise})
  endif()
elseif(_wanted STREQUAL "all")
  set(_wanted "")
  foreach(item IN LISTS _all)
    if(item STREQUAL "ptx" OR "sm_${item}" IN_LIST _known)
      list(APPEND _wanted ${item})
    else()
      message(STATUS "this nvcc has no machine code for compute capability ${item} (times ten): left out")
    endif()
  endforeach()
endif()
list(REMOVE_DUPLICATES _wanted)
set(CONVGRAD_CUDA_DEFINITIONS CONVGRAD_SPECIALISED)
if(_wanted STREQUAL "generic")
  set(_wanted ptx)
  set(CONVGRAD_CUDA_DEFINITIONS "")
endif()

# From one PTX for all, so that the front end, which takes most of the time, runs once. For
# compute capabilities 8.0 and 9.0 the machine code is the same as from their own.
set(_codes "")
set(CONVGRAD_HOPPER_GENCODE "")
set(CONVGRAD_CUDA_CODE "")
foreach(item IN LISTS _wanted)
  if(item STREQUAL "ptx")
    list(APPEND _codes compute_${_lowest})
    continue()
  endif()
  if(NOT item MATCHES "^[0-9]+$" OR item LESS _lowest OR NOT "sm_${item}" IN_LIST _known)
    list(JOIN _known " " _known)
    message(FATAL_ERROR "JAX_CONVGRAD_CUDA_ARCHITECTURES must be native, all, ptx, generic, or compute capabilities "
      "times ten from ${_lowest} on that this nvcc knows (${_known}), got ${JAX_CONVGRAD_CUDA_ARCHITECTURES}")
  endif()
  list(APPEND _codes sm_${item})
  if(item EQUAL 90)
    set(CONVGRAD_HOPPER_GENCODE -gencode=arch=compute_90a,code=sm_90a)
    list(APPEND CONVGRAD_CUDA_DEFINITIONS CONVGRAD_WGMMA)
  endif()
endforeach()
list(JOIN _codes "," _list)
set(CONVGRAD_GENCODE "-gencode=arch=compute_${_lowest},code=[${_list}]")
if(CONVGRAD_HOPPER_GENCODE)
  list(APPEND _codes sm_90a)
endif()
list(JOIN _codes " " CONVGRAD_CUDA_CODE)
set(CONVGRAD_CUDA_SUMMARY "${CONVGRAD_CUDA_CODE}")
if(NOT CONVGRAD_CUDA_DEFINITIONS)
  string(APPEND CONVGRAD_CUDA_SUMMARY " of the kernels direct and tiled")
endif()
if(_why)
  string(APPEND CONVGRAD_CUDA_SUMMARY ", ${_why}")
endif()
