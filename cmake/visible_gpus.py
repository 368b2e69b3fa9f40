"""Prints the compute capabilities, times ten, of the GPUs that CUDA sees: "80;90".

Asks the driver's library, which heeds CUDA_VISIBLE_DEVICES. Prints nothing without one.
"""

import ctypes


def _capabilities() -> set[int]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return set()
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    number, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return set()
    found = set()
    for index in range(number.value):
        values = []
        for attribute in (major, minor):
            value = ctypes.c_int()
            if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetAttribute(
                ctypes.byref(value), attribute, device
            ):
                return set()
            values.append(value.value)
        found.add(10 * values[0] + values[1])
    return found


print(";".join(map(str, sorted(_capabilities()))))
