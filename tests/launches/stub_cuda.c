/* A CUDA driver without a device: enough of libcuda for triton's launch path to run as it does on a GPU, up to the
 * launch itself, which is checked and recorded instead. What a device would refuse is refused here: shared memory, grids,
 * threads, tensor maps. Limits come from the environment (STUB_SHARED, bytes a block may have). */
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DONE return CUDA_SUCCESS
#define REFUSE(...) do { fprintf(stderr, "refused: " __VA_ARGS__); fprintf(stderr, "\n"); return CUDA_ERROR_INVALID_VALUE; } while (0)

static char launched[1 << 20]; /* names, each on its line */
static size_t used;
static int context;

void stub_reset(void) { used = 0; launched[0] = 0; }
const char *stub_launched(void) { return launched; }

static int shared_limit(void) { const char *s = getenv("STUB_SHARED"); return s ? atoi(s) : 49152; }

CUresult cuInit(unsigned flags) { DONE; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the stub"; DONE; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; DONE; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; DONE; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit() + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    DONE;
}
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&context; DONE; }
CUresult cuCtxSetCurrent(CUcontext c) { DONE; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; DONE; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; DONE; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { DONE; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { *c = (CUcontext)&context; DONE; }
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { DONE; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0; *active = 1; DONE; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; DONE; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)image; DONE; }
CUresult cuModuleUnload(CUmodule module) { DONE; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)strdup(name); DONE; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    DONE;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > shared_limit())
        REFUSE("%s wants %d bytes of shared memory, a block has %d", (char *)function, value, shared_limit());
    DONE;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { DONE; }
CUresult cuOccupancyMaxActiveClusters(int *number, CUfunction function, const CUlaunchConfig *config) { *number = 132; DONE; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) { *(CUdeviceptr *)data = pointer; DONE; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    const char *name = (const char *)function;
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if ((int)config->sharedMemBytes > shared_limit())
        REFUSE("%s wants %u bytes of shared memory, a block has %d", name, config->sharedMemBytes, shared_limit());
    if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) REFUSE("%s has an empty grid", name);
    if (config->gridDimX > 2147483647u || config->gridDimY > 65535 || config->gridDimZ > 65535)
        REFUSE("%s has a grid of %u x %u x %u", name, config->gridDimX, config->gridDimY, config->gridDimZ);
    if (!threads || threads > 1024) REFUSE("%s has %u threads", name, threads);
    if (used + strlen(name) + 2 > sizeof launched) REFUSE("too many launches are recorded");
    used += (size_t)sprintf(launched + used, "%s\n", name);
    DONE;
}

static int size_of(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16: case CU_TENSOR_MAP_DATA_TYPE_FLOAT16: case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64: case CU_TENSOR_MAP_DATA_TYPE_UINT64: case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
    }
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    unsigned inner = box[0] * size_of(type), widest = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
        : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : 1u << 30;
    if (rank < 1 || rank > 5) REFUSE("a tensor map of rank %u", rank);
    if ((size_t)address % 16) REFUSE("a tensor map at an address that 16 does not divide");
    for (unsigned i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32) REFUSE("a tensor map with an axis of %llu", (unsigned long long)sizes[i]);
        if (!box[i] || box[i] > 256) REFUSE("a tensor map with a box of %u", box[i]);
        if (steps[i] < 1 || steps[i] > 8) REFUSE("a tensor map with steps of %u", steps[i]);
    }
    for (unsigned i = 0; i + 1 < rank; i++) /* in bytes, of all axes but the innermost */
        if (!strides[i] || strides[i] % 16 || strides[i] >= 1ull << 40)
            REFUSE("a tensor map with a stride of %llu bytes", (unsigned long long)strides[i]);
    if (inner % 16) REFUSE("a tensor map with a box of %u bytes", inner);
    if (inner > widest) REFUSE("a tensor map with a box of %u bytes under a swizzle of %u", inner, widest);
    DONE;
}
