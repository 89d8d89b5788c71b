/* A CUDA driver without a GPU, for bench/host_time.py: the functions that Triton's launcher calls, all of which succeed.
   Kernels are launched into the void; the only thing kept is how often. */

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

static long launches, descriptors;
static char handle;

long count_of_launches(void) { return launches; }
long count_of_descriptors(void) { return descriptors; }

CUresult cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  launches++;
  return 0;
}
CUresult cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const void *sizes,
                                const void *strides, const void *box, const void *steps, int interleave, int swizzle,
                                int promotion, int fill) {
  descriptors++;
  return 0;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  /* CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN and _MULTIPROCESSOR_COUNT of an H100; else large enough */
  *value = attribute == 97 ? 232448 : attribute == 16 ? 132 : 65536;
  return 0;
}
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK; no registers, no spills */
  return 0;
}
CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer; /* memory of the CPU passes for the device's */
  return 0;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "no error: the driver is a stand-in";
  return 0;
}
CUresult cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { return *module = &handle, 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { return *function = &handle, 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &handle, 0; }
CUresult cuDevicePrimaryCtxRetain_v2(void **context, int device) { return *context = &handle, 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetCurrent(void **context) { return *context = &handle, 0; }
CUresult cuCtxSetLimit(int limit, unsigned long value) { return 0; }
CUresult cuCtxGetLimit(unsigned long *value, int limit) { return *value = 0, 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { return *count = 1, 0; }
