// Kernels with the faults that the shim is there to find. Each: `x` [256] in, `out` [256]; one family for `cuda_shim`.

typedef unsigned int u32;

// Correct: turns a block's numbers around.
extern "C" __global__ void sound(const float* __restrict__ x, float* __restrict__ out) {
    __shared__ float shared[256];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[255 - threadIdx.x];
}

extern "C" __global__ void lacks_a_barrier(const float* __restrict__ x, float* __restrict__ out) {
    __shared__ float shared[256];
    shared[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = shared[255 - threadIdx.x];
}

// The second round overwrites what a slow warp has not read yet.
extern "C" __global__ void lacks_the_second_barrier(const float* __restrict__ x, float* __restrict__ out) {
    __shared__ float shared[256];
    float sum = 0.0f;
    for (int round = 0; round < 2; round++) {
        shared[threadIdx.x] = x[threadIdx.x] + (float)round;
        __syncthreads();
        sum += shared[255 - threadIdx.x] * (float)(round + 1);
    }
    out[threadIdx.x] = sum;
}

extern "C" __global__ void reads_what_nobody_wrote(const float* __restrict__ x, float* __restrict__ out) {
    __shared__ float shared[256];
    if (threadIdx.x != 7) shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x];
}

extern "C" __global__ void depends_on_the_order_of_blocks(const float* __restrict__ x, float* __restrict__ out) {
    out[threadIdx.x] = x[threadIdx.x] + (float)blockIdx.x;
}

extern "C" __global__ void writes_past_the_end(const float* __restrict__ x, float* __restrict__ out) {
    out[threadIdx.x + 1] = x[threadIdx.x];
}

extern "C" __global__ void writes_its_input(float* __restrict__ x, float* __restrict__ out) {
    out[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = 0.0f;
}

extern "C" __global__ void misses_a_barrier(const float* __restrict__ x, float* __restrict__ out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        out[threadIdx.x] = __shfl_sync(0xffffffffu, threadIdx.x % 32 == 3 ? (__syncthreads(), x[0]) : x[1], 0);
    }
}

extern "C" __global__ void loses_a_lane(const float* __restrict__ x, float* __restrict__ out) {
    if (threadIdx.x % 32 == 5) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}
