# Sets CONVGRAD_VISIBLE_GPUS: the compute capabilities, times ten, of the GPUs that CUDA
# sees on this machine, as the driver's library counts them.

include_guard()
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/visible_gpus.py"
  OUTPUT_VARIABLE CONVGRAD_VISIBLE_GPUS OUTPUT_STRIP_TRAILING_WHITESPACE)
