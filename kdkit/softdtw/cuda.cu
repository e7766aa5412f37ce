// Soft-DTW of a ragged batch in float32: the kernels of kdkit.softdtw.cuda. They include no header.
//
// The recursion is that of backend "native" (kdkit/softdtw/_kernels.py): Z = exp(-R / gamma) as a mantissa in [1, 2)
// and an exponent of its own, one polynomial a cell, and two predecessors' shares in the sum kept for the way back.
//
// Layout: of each sample the admissible cells alone, anti-diagonal after anti-diagonal, each in the order of its rows
// ("packed"). `pack` and `spread` change between that and the matrix by way of tiles in shared memory: both sides are
// read and written in whole lines. In between, one block works on one sample, a barrier after each anti-diagonal.
//
// In shared memory lie the last two anti-diagonals and the current one. Position 1 is the first admissible row; the
// positions on either side of the admissible ones are borders that stand for "nothing": no neighbour needs a check.
// From one anti-diagonal to the next, the first row stays or grows by one, and so does the last.

typedef long long Index;

struct Diagonal {
    Index first, last;  // admissible rows; first > last past a sample's end
    Index slot;         // packed slot of the first
};

struct Batch {
    const Diagonal* diagonals;  // (B, num_diagonals)
    const Index* lengths;       // (2, B): rows, then columns
    Index num_samples, num_diagonals;
    Index rows, columns;  // N and M of the padded costs (B, N, M)
    Index size;           // positions of the widest anti-diagonal, its borders included
};

struct Power {
    float mantissa;
    int exponent;
};

struct Flow {
    float up, left, diagonal;  // mass that a cell hands to each of its predecessors
};

extern __shared__ double shared[];  // as many bytes as the host says: a tile, or three anti-diagonals

const int TILE = 32;
const int AHEAD = 4;  // a thread asks for what it reads this many anti-diagonals early
const int NOTHING = -(1 << 30);
const int UNREACHED = -(1 << 29);
const float MAX_TOTAL = 268435456.0f;  // 2^28: |costs| of a path must sum to less, in units of gamma log 2
const float MAX_POWER = 4194304.0f;    // 2^22
const float ROUNDING = 12582912.0f;    // 1.5 * 2^23: x + ROUNDING has the whole number next to x in its lowest bits
const int ROUNDING_BITS = 0x4B400000;
const int LEAST_SHARE = 127 - 32;  // predecessors 2^-32 below the largest count as 0

__device__ __forceinline__ Index num_rows(const Batch& batch, Index b) { return batch.lengths[b]; }

__device__ __forceinline__ Index num_columns(const Batch& batch, Index b) {
    return batch.lengths[batch.num_samples + b];
}

// Of sample b; 0 if a side is empty.
__device__ __forceinline__ Index count_diagonals(const Batch& batch, Index b) {
    const Index n = num_rows(batch, b), m = num_columns(batch, b);
    return n > 0 && m > 0 ? n + m - 1 : 0;
}

// Packed slot of cell (i, j), -1 where it is not admissible.
__device__ __forceinline__ Index slot_of(const Batch& batch, Index b, Index i, Index j) {
    if (i >= num_rows(batch, b) || j >= num_columns(batch, b)) return -1;
    const Diagonal here = batch.diagonals[b * batch.num_diagonals + i + j];
    return here.first <= i && i <= here.last ? here.slot + i - here.first : -1;
}

// What thread t reads first on anti-diagonal a: the value at position t, if there is one.
__device__ __forceinline__ float value_at(const Diagonal* diagonals, Index a, Index count, const float* packed, int t) {
    if (a < 0 || a >= count) return 0.0f;
    const Diagonal there = diagonals[a];
    return 1 <= t && t <= there.last - there.first + 1 ? packed[there.slot + t - 1] : 0.0f;
}

// The oldest value that was asked for; `newest` takes its place at the end.
__device__ __forceinline__ float advance(float (&ahead)[AHEAD], float newest) {
    const float oldest = ahead[0];
#pragma unroll
    for (int d = 0; d + 1 < AHEAD; d++) ahead[d] = ahead[d + 1];
    ahead[AHEAD - 1] = newest;
    return oldest;
}

// 2^exponent for a whole number <= 0, 0 below 2^-32.
__device__ __forceinline__ float power_of_two(int exponent) {
    const int biased = exponent + 127;
    return __int_as_float(biased > LEAST_SHARE ? biased << 23 : 0);
}

// 2^x on [-0.5, 0.5]; relative error 3e-9 before rounding.
__device__ __forceinline__ float exp2_near_0(float x) {
    float p = 0.00015461444854736328f;
    p = __fmaf_rn(p, x, 0.0013400427997112274f);
    p = __fmaf_rn(p, x, 0.009618056938052177f);
    p = __fmaf_rn(p, x, 0.05550327152013779f);
    p = __fmaf_rn(p, x, 0.24022650718688965f);
    p = __fmaf_rn(p, x, 0.6931471824645996f);
    return __fmaf_rn(p, x, 1.0f);
}

// Admissible costs of all samples into packed order. Grid: samples, tiles of rows, tiles of columns.
extern "C" __global__ void pack(Batch batch, const float* __restrict__ cost, float* __restrict__ packed) {
    const Index b = blockIdx.x, top = (Index)blockIdx.y * TILE, left = (Index)blockIdx.z * TILE;
    float* tile = (float*)shared;  // walked along rows and along anti-diagonals: 32 and 31 apart, no bank twice
    for (int k = threadIdx.x; k < TILE * TILE; k += blockDim.x) {
        const Index i = top + k / TILE, j = left + k % TILE;
        if (slot_of(batch, b, i, j) >= 0) tile[k] = cost[(b * batch.rows + i) * batch.columns + j];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < 2 * TILE * TILE; k += blockDim.x) {
        const int row = k % TILE, column = k / TILE - row;
        if (column < 0 || column >= TILE) continue;
        const Index slot = slot_of(batch, b, top + row, left + column);
        if (slot >= 0) packed[slot] = tile[row * TILE + column];
    }
}

// Packed alignments times each sample's factor into (B, N, M); exactly 0 where an alignment is. Grid: as `pack`.
extern "C" __global__ void spread(
    Batch batch, const float* __restrict__ packed, const float* __restrict__ factors, float* __restrict__ out) {
    const Index b = blockIdx.x, top = (Index)blockIdx.y * TILE, left = (Index)blockIdx.z * TILE;
    float* tile = (float*)shared;
    for (int k = threadIdx.x; k < 2 * TILE * TILE; k += blockDim.x) {
        const int row = k % TILE, column = k / TILE - row;
        if (column < 0 || column >= TILE) continue;
        const Index slot = slot_of(batch, b, top + row, left + column);
        tile[row * TILE + column] = slot >= 0 ? packed[slot] : 0.0f;
    }
    __syncthreads();
    const float factor = factors[b];
    for (int k = threadIdx.x; k < TILE * TILE; k += blockDim.x) {
        const Index i = top + k / TILE, j = left + k % TILE;
        const float mass = tile[k];
        if (i < batch.rows && j < batch.columns)
            out[(b * batch.rows + i) * batch.columns + j] = mass == 0.0f ? 0.0f : mass * factor;
    }
}

// A cell's Z from those of its predecessors and its cost; their shares go to share_up and share_left.
// Returns whether the cost fits the format; +inf does.
__device__ __forceinline__ bool step(
    Power diagonal, Power up, Power left, float cost, float scale, float limit,
    Power* own, float* share_up, float* share_left) {
    const int most = max(max(diagonal.exponent, up.exponent), left.exponent);
    const float z_diagonal = diagonal.mantissa * power_of_two(diagonal.exponent - most);
    const float z_up = up.mantissa * power_of_two(up.exponent - most);
    const float z_left = left.mantissa * power_of_two(left.exponent - most);
    const float total = z_diagonal + z_up + z_left;
    *share_up = z_up / total;
    // Where nothing comes from the third, the two must leave exactly nothing for it.
    *share_left = z_diagonal > 0.0f ? z_left / total : 1.0f - *share_up;

    const float power = cost * scale;
    const bool fits = fabsf(power) < limit;
    const float rounded = (fits ? power : 0.0f) + ROUNDING;
    const float x = fits ? __fmaf_rn(-cost, scale, rounded - ROUNDING) : 0.0f;
    const int bits = __float_as_int(total * exp2_near_0(x));
    const int whole = __float_as_int(rounded) - ROUNDING_BITS;
    own->mantissa = __int_as_float((bits & 0x7FFFFF) | 0x3F800000);
    own->exponent = fits ? most - whole + (bits >> 23) - 127 : NOTHING;
    return fits || (isinf(cost) && cost > 0.0f);
}

__device__ __forceinline__ void forward_sample(
    const Batch& batch, double gamma, float* share_up, float* share_left, float* values, int* misfits, Power* state) {
    const Index b = blockIdx.x, count = count_diagonals(batch, b);
    const Diagonal* diagonals = batch.diagonals + b * batch.num_diagonals;
    const int t = threadIdx.x;
    const float scale = (float)(1.4426950408889634 / gamma);  // log2(e) / gamma
    const float limit = fminf(MAX_POWER, MAX_TOTAL / (float)count);
    Power *before = state, *last = before + batch.size, *current = last + batch.size;
    for (Index k = t; k < 3 * batch.size; k += blockDim.x) state[k] = {1.0f, k == 0 ? 0 : NOTHING};  // Z(-1, -1) = 1
    float ahead[AHEAD];
    for (int d = 0; d < AHEAD; d++) ahead[d] = value_at(diagonals, d, count, share_up, t);
    Index first_before = 0, first_last = 0;
    int misfit = 0;
    __syncthreads();
    for (Index a = 0; a < count; a++) {
        const Diagonal here = diagonals[a];
        const int width = (int)(here.last - here.first) + 1;
        const int to_before = (int)(here.first - first_before), to_last = (int)(here.first - first_last);
        const float early = advance(ahead, value_at(diagonals, a + AHEAD, count, share_up, t));
        for (int k = t; k < width + 2; k += blockDim.x) {
            if (k == 0 || k > width) {
                current[k] = {1.0f, NOTHING};
                continue;
            }
            const Index slot = here.slot + k - 1;
            const float cost = k == t ? early : share_up[slot];
            float to_up, to_left;
            const bool fits = step(
                before[k - 1 + to_before], last[k - 1 + to_last], last[k + to_last], cost, scale, limit,
                current + k, &to_up, &to_left);
            misfit |= !fits;
            if (share_left != nullptr) {
                share_up[slot] = to_up;
                share_left[slot] = to_left;
            }
        }
        Power* oldest = before;
        before = last, last = current, current = oldest;
        first_before = first_last, first_last = here.first;
        __syncthreads();
    }
    misfit = __syncthreads_or(misfit);
    if (t != 0) return;
    misfits[b] = misfit;
    const Power end = last[1];
    const double value = -gamma * 0.6931471805599453 * (end.exponent + log2((double)end.mantissa));
    values[b] = end.exponent < UNREACHED ? __int_as_float(0x7F800000) : (float)value;
}

// Values and shares. On entry share_up has the packed costs. share_left == nullptr: values alone. Grid: samples.
// misfits[b]: a cost was NaN, -inf or too large for the format, and what was found is nothing to go by.
// wide: 3 * size positions for each sample, where shared memory does not hold them; else nullptr.
extern "C" __global__ void __launch_bounds__(1024) forward(
    Batch batch, double gamma, float* share_up, float* share_left, float* values, int* misfits, Power* wide) {
    if (count_diagonals(batch, blockIdx.x) == 0) {
        if (threadIdx.x == 0) values[blockIdx.x] = 0.0f, misfits[blockIdx.x] = 0;
    } else if (wide == nullptr) {
        forward_sample(batch, gamma, share_up, share_left, values, misfits, (Power*)shared);
    } else {
        Power* state = wide + 3 * batch.size * blockIdx.x;
        forward_sample(batch, gamma, share_up, share_left, values, misfits, state);
    }
}

// log(e^a + e^b + e^c); NaN if one is.
__device__ double log_sum(double a, double b, double c) {
    if (a != a || b != b || c != c) return a != a ? a : b != b ? b : c;
    const double most = fmax(fmax(a, b), c);
    return isinf(most) ? most : most + log(exp(a - most) + exp(b - most) + exp(c - most));
}

// e^(part - total) for a part of the sum; 0 for a cell that nothing can reach.
__device__ float share_of(double part, double total) {
    const double share = exp(part - total);
    return share == share ? (float)share : 0.0f;
}

// What `forward` does, for its misfits alone: on r = -R / gamma in float64, which any cost fits. All other blocks leave
// at once. That way the host need not look whether there is a misfit, which would make it wait for the device.
extern "C" __global__ void __launch_bounds__(1024) forward_misfits(
    Batch batch, double gamma, const float* __restrict__ cost, float* share_up, float* share_left, float* values,
    const int* misfits, double* wide) {
    const Index b = blockIdx.x, count = count_diagonals(batch, b);
    if (!misfits[b]) return;
    const Diagonal* diagonals = batch.diagonals + b * batch.num_diagonals;
    const double nothing = log(0.0);
    double* before = wide == nullptr ? shared : wide + 3 * batch.size * b;
    double *last = before + batch.size, *current = last + batch.size;
    for (Index k = threadIdx.x; k < 3 * batch.size; k += blockDim.x) before[k] = k == 0 ? 0.0 : nothing;
    Index first_before = 0, first_last = 0;
    __syncthreads();
    for (Index a = 0; a < count; a++) {
        const Diagonal here = diagonals[a];
        const Index width = here.last - here.first + 1;
        for (Index k = threadIdx.x; k < width + 2; k += blockDim.x) {
            if (k == 0 || k > width) {
                current[k] = nothing;
                continue;
            }
            const Index i = here.first + k - 1, slot = here.slot + k - 1;
            const double diagonal = before[k - 1 + here.first - first_before];
            const double up = last[k - 1 + here.first - first_last], left = last[k + here.first - first_last];
            const double total = log_sum(diagonal, up, left);
            current[k] = total - cost[(b * batch.rows + i) * batch.columns + a - i] / gamma;
            if (share_left != nullptr) {
                share_up[slot] = share_of(up, total);
                share_left[slot] = share_of(left, total);
            }
        }
        double* oldest = before;
        before = last, last = current, current = oldest;
        first_before = first_last, first_last = here.first;
        __syncthreads();
    }
    if (threadIdx.x == 0) values[b] = (float)(-gamma * last[1]);
}

__device__ __forceinline__ void backward_sample(
    const Batch& batch, const float* values, const float* share_up, float* share_left, Flow* state) {
    const Index b = blockIdx.x, count = count_diagonals(batch, b);
    const Diagonal* diagonals = batch.diagonals + b * batch.num_diagonals;
    const int t = threadIdx.x;
    const float value = values[b];
    Flow *after = state, *next = after + batch.size, *current = next + batch.size;
    for (Index k = t; k < 3 * batch.size; k += blockDim.x) state[k] = {0.0f, 0.0f, 0.0f};
    float ahead_up[AHEAD], ahead_left[AHEAD];
    for (int d = 0; d < AHEAD; d++) {
        ahead_up[d] = value_at(diagonals, count - 1 - d, count, share_up, t);
        ahead_left[d] = value_at(diagonals, count - 1 - d, count, share_left, t);
    }
    Index first_after = num_rows(batch, b) - 1, first_next = first_after;
    __syncthreads();
    for (Index a = count - 1; a >= 0; a--) {
        const Diagonal here = diagonals[a];
        const int width = (int)(here.last - here.first) + 1;
        const int to_after = (int)(here.first - first_after), to_next = (int)(here.first - first_next);
        const float early_up = advance(ahead_up, value_at(diagonals, a - AHEAD, count, share_up, t));
        const float early_left = advance(ahead_left, value_at(diagonals, a - AHEAD, count, share_left, t));
        for (int k = t; k < width + 2; k += blockDim.x) {
            if (k == 0 || k > width) {
                current[k] = {0.0f, 0.0f, 0.0f};
                continue;
            }
            const Index slot = here.slot + k - 1;
            const float to_up = k == t ? early_up : share_up[slot], to_left = k == t ? early_left : share_left[slot];
            float mass = after[k + 1 + to_after].diagonal + next[k + 1 + to_next].up + next[k + to_next].left;
            if (a == count - 1) mass = isinf(value) && value > 0.0f ? 0.0f : 1.0f;  // no path, no mass
            if (value != value) mass = value;
            share_left[slot] = mass;
            current[k] = {mass * to_up, mass * to_left, mass * fmaxf(1.0f - to_up - to_left, 0.0f)};
        }
        Flow* oldest = after;
        after = next, next = current, current = oldest;
        first_after = first_next, first_next = here.first;
        __syncthreads();
    }
}

// Expected alignments, packed: share_left on return. Grid: samples. wide: as for `forward`.
extern "C" __global__ void __launch_bounds__(1024) backward(
    Batch batch, const float* values, const float* share_up, float* share_left, Flow* wide) {
    if (wide == nullptr)
        backward_sample(batch, values, share_up, share_left, (Flow*)shared);
    else
        backward_sample(batch, values, share_up, share_left, wide + 3 * batch.size * blockIdx.x);
}
