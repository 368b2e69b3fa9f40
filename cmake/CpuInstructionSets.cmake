# Which instruction sets the CPU kernels are compiled for, by JAX_CONVGRAD_CPU_ISAS:
#
#   native    those that this processor runs, from AVX2 on
#   all       every one that the compiler knows, for wheels and containers
#   (empty)   native
#
# Sets CONVGRAD_CPU_ISAS, those with all kernels, the slowest to compile first;
# CONVGRAD_CPU_BF16_ISAS, those that replace one kernel of avx512's by their products of
# bfloat16; and CONVGRAD_CPU_SUMMARY.

set(CONVGRAD_CPU_ISAS portable)
set(CONVGRAD_CPU_BF16_ISAS "")
string(STRIP "${JAX_CONVGRAD_CPU_ISAS}" _wanted)
if(_wanted STREQUAL "")
  set(_wanted native)
endif()
if(NOT _wanted MATCHES "^(native|all)$")
  message(FATAL_ERROR "JAX_CONVGRAD_CPU_ISAS must be native or all, got '${_wanted}'")
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  # This processor's features, in Linux's words; without them, all are built.
  if(NOT CONVGRAD_CPUINFO)
    set(CONVGRAD_CPUINFO /proc/cpuinfo)
  endif()
  set(_features "")
  if(_wanted STREQUAL "native" AND EXISTS "${CONVGRAD_CPUINFO}" AND NOT CMAKE_CROSSCOMPILING)
    file(STRINGS "${CONVGRAD_CPUINFO}" _features REGEX "^flags" LIMIT_COUNT 1)
    string(REGEX MATCHALL "[a-z0-9_]+" _features "${_features}")
  endif()
  # Sets result to whether kernels for these features are wanted.
  function(_wants result)
    set(${result} ON PARENT_SCOPE)
    foreach(feature IN LISTS ARGN)
      if(_features AND NOT feature IN_LIST _features)
        set(${result} OFF PARENT_SCOPE)
      endif()
    endforeach()
  endfunction()
  _wants(_avx2 avx2 fma f16c)
  if(_features AND _avx2)
    set(CONVGRAD_CPU_ISAS avx2)
  else()
    list(PREPEND CONVGRAD_CPU_ISAS avx2)
  endif()
  _wants(_avx512 avx512f avx512bw avx512vl avx512dq)
  if(_avx512)
    list(PREPEND CONVGRAD_CPU_ISAS avx512)
    include(CheckCXXCompilerFlag)
    _wants(_bf16 avx512_bf16)
    if(_bf16)
      check_cxx_compiler_flag(-mavx512bf16 JAX_CONVGRAD_HAVE_AVX512_BF16)
    endif()
    if(_bf16 AND JAX_CONVGRAD_HAVE_AVX512_BF16)
      list(APPEND CONVGRAD_CPU_BF16_ISAS avx512_bf16)
      _wants(_amx amx_tile amx_bf16)
      if(_amx)
        check_cxx_compiler_flag("-mamx-tile -mamx-bf16" JAX_CONVGRAD_HAVE_AMX)
      endif()
      if(_amx AND JAX_CONVGRAD_HAVE_AMX)
        list(APPEND CONVGRAD_CPU_BF16_ISAS amx)
      endif()
    endif()
  endif()
endif()

list(JOIN CONVGRAD_CPU_BF16_ISAS " " CONVGRAD_CPU_SUMMARY)
list(JOIN CONVGRAD_CPU_ISAS " " _summary)
string(STRIP "${CONVGRAD_CPU_SUMMARY} ${_summary}" CONVGRAD_CPU_SUMMARY)
if(_features)
  string(APPEND CONVGRAD_CPU_SUMMARY ", as on this machine; JAX_CONVGRAD_CPU_ISAS=all compiles for others")
endif()
