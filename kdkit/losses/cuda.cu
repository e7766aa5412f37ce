// The losses over a chunk's logits, and their gradient by the logits: the kernels of kdkit.losses.cuda. They include no
// header.
//
// A block takes a position, its threads share the columns. With q and p the distributions of student and teacher at a
// temperature, every term adds to a column's g its weight times the derivative of its value by log q, and
//
//     gradient by z = (g - q * sum of g) / temperature.
//
// A row is walked three times, one walk more for every further divergence: for the largest logit and the sum of the
// exponentials, at all temperatures at once; for the values and the sum of g; for the gradient. Exponentials are found
// again instead of kept, so that nothing is written but the gradient. In float16 one walk more finds its largest entry:
// each row is divided by a power of two near that, or its small entries would be lost.
//
// A teacher that kept some ids is compared over these and the rest as the last column; a bit for each id, in shared
// memory, says which are kept.

typedef long long Index;

const int MOST_GROUPS = 4, MOST_TERMS = 8;
const float LOWEST = -3.4028234663852886e38f;
const float LEAST_MASS = 1e-37f;  // a mixture below it: neither side gives the id anything that float32 can tell

enum Kind { FORWARD_KL, REVERSE_KL, JSD, TVD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, ALPHA_BETA, LABELS };  // as `Kind`
enum Who { STUDENT, TEACHER };

struct Group {
    float factors[2];  // on the logits of student and teacher
    int asks_teacher;
};

struct Term {
    int kind, group;
    float first, second;         // its own two numbers
    float weight;                // 0: its value alone is wanted
    const float* token_weights;  // (n,), or nullptr
    const Index* targets;        // (n,), of labels
};

struct Pass {
    const void* student;   // (n, num_ids) logits
    const void* teacher;   // the same, or nullptr
    const Index* kept;     // (n, num_kept) ids
    const float* known;    // (num_groups, n, num_kept + 1) the teacher's log-probabilities, the rest last
    void* gradient;        // (n, num_ids), may be the student's logits; nullptr: none is formed
    float* row_scales;     // (n,) factors on the rows of a gradient in half precision
    float* values;         // (num_terms, n) weighted, rows `value_stride` apart
    float* entropies;      // (n,) the teacher's at the first temperature, or nullptr
    float* label_logprobs; // (n,) the student's, of the first labels, or nullptr
    Index value_stride;
    int num_ids, num_kept, num_groups, num_terms;
    Group groups[MOST_GROUPS];
    Term terms[MOST_TERMS];
};

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

template <typename Stored>
constexpr bool IS_NARROW = false;  // of so few exponents that a gradient needs a scale of its own

template <>
constexpr bool IS_NARROW<Half> = true;

// The sum of some exponentials: total * e^top.
struct Mass {
    float top, total;
};

struct Sums {
    float value, derivative;
};

struct Largest {
    float size;
};

struct Distribution {
    float factor, top, log_total, inverse_total;
};

// What is known of a temperature.
struct State {
    Distribution sides[2];
    Mass rest;      // the student's ids that are not kept
    float of_rest;  // g of the rest as one column
    float added;    // the sum of g
    float doubt;    // NaN where nothing found can be right, else 0
};

struct Desk {
    State states[MOST_GROUPS];
    float weights[MOST_TERMS];  // of the terms at this position
    int targets[MOST_TERMS];
};

static_assert(sizeof(Desk) == 272 && sizeof(Mass) == 8 && sizeof(Sums) == 8, "the host asks for as much");

// An id, -1 for none, and its column, -1 if it shares the last one.
struct Visit {
    int id, column;
};

// A column, seen from both sides.
struct Point {
    float q, p, log_q, log_p;
};

extern __shared__ double shared[];  // a Desk, a Mass or Sums for each thread, a bit for each id

__device__ __forceinline__ Desk& desk() { return *(Desk*)shared; }

__device__ __forceinline__ void* scratch() { return (Desk*)shared + 1; }

__device__ __forceinline__ unsigned* marks() { return (unsigned*)((Mass*)scratch() + blockDim.x); }

__device__ __forceinline__ void mark(int id) { atomicOr(marks() + (id >> 5), 1u << (id & 31)); }

__device__ __forceinline__ bool is_marked(int id) { return marks()[id >> 5] >> (id & 31) & 1; }

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(BFloat16 value) { return __int_as_float((int)value.bits << 16); }

__device__ __forceinline__ float to_float(Half value) {
    const int sign = (value.bits & 0x8000) << 16, bits = (value.bits & 0x7FFF) << 13;
    const float size = __int_as_float(bits) * 5.192296858534828e33f;  // 2^112 moves the exponent, also of subnormals
    const bool is_finite = bits < 0x7C00 << 13;
    return __int_as_float(sign | (is_finite ? __float_as_int(size) : bits | 0x7F800000));
}

// The nearest number of a dtype, the even one of two.
__device__ __forceinline__ void store(float* place, float value) { *place = value; }

__device__ __forceinline__ void store(BFloat16* place, float value) {
    const unsigned bits = (unsigned)__float_as_int(value);
    const unsigned rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    place->bits = (unsigned short)(value == value ? rounded : 0x7FC0);
}

__device__ __forceinline__ void store(Half* place, float value) {
    const unsigned bits = (unsigned)__float_as_int(value), sign = bits >> 16 & 0x8000;
    const unsigned normal = ((bits & 0x7FFFFFFF) - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    const float size = fabsf(value);
    // Next to 0.5, float32 has the steps of a subnormal float16.
    const unsigned subnormal = (unsigned)__float_as_int(size + 0.5f) - 0x3F000000;
    const unsigned finite = size < 6.103515625e-05f ? subnormal : normal;
    place->bits = (unsigned short)(sign | (size < 65520.0f ? finite : size == size ? 0x7C00 : 0x7E00));
}

__device__ __forceinline__ Largest sum_of(Largest a, Largest b) { return {a.size > b.size ? a.size : b.size}; }

__device__ __forceinline__ Mass sum_of(Mass a, Mass b) {
    const float top = a.top > b.top ? a.top : b.top;
    return {top, a.total * expf(a.top - top) + b.total * expf(b.top - top)};
}

__device__ __forceinline__ Sums sum_of(Sums a, Sums b) { return {a.value + b.value, a.derivative + b.derivative}; }

__device__ __forceinline__ void add(Mass& mass, float x) {
    const float e = expf(-fabsf(x - mass.top));
    const bool is_top = x > mass.top;
    mass.total = is_top ? mass.total * e + 1.0f : mass.total + e;
    mass.top = is_top ? x : mass.top;
}

// The sum over the block, for each thread, always in the same order.
template <typename Summand>
__device__ __forceinline__ Summand sum_of_block(Summand own) {
    Summand* all = (Summand*)scratch();
    all[threadIdx.x] = own;
    __syncthreads();
    for (unsigned count = blockDim.x; count > 1;) {
        const unsigned half = (count + 1) / 2;
        if (threadIdx.x + half < count) all[threadIdx.x] = sum_of(all[threadIdx.x], all[threadIdx.x + half]);
        count = half;
        __syncthreads();
    }
    const Summand sum = all[0];
    __syncthreads();
    return sum;
}

// log x times what is 0 where x is.
__device__ __forceinline__ float log_or_0(float x) { return x > 0.0f ? logf(x) : 0.0f; }

// part / mix, 0 where there is neither.
__device__ __forceinline__ float share_of(float part, float mix) { return mix < LEAST_MASS ? 0.0f : part / mix; }

// A column's part of a divergence, and its derivative by log q. An id that is -inf on both sides adds nothing.
__device__ __forceinline__ Sums part_of(const Term& term, const Point& at) {
    const float q = at.q, p = at.p, own = term.first, rest = 1.0f - own;
    const float ratio = at.log_q == at.log_p ? 0.0f : at.log_q - at.log_p;
    switch (term.kind) {
        case FORWARD_KL: return {-p * ratio, -p};
        case REVERSE_KL: return {q * ratio, q * ratio + q};
        case JSD: {
            const float mix = own * p + rest * q;
            const float of_student = rest * q * log_or_0(share_of(q, mix));
            return {own * p * log_or_0(share_of(p, mix)) + of_student, of_student};
        }
        case TVD: {
            const float gap = q - p;
            return {0.5f * fabsf(gap), gap > 0.0f ? 0.5f * q : gap < 0.0f ? -0.5f * q : 0.0f};
        }
        case SKEW_FORWARD_KL: {
            const float over = share_of(p, own * p + rest * q);
            return {p * log_or_0(over), -rest * q * over};
        }
        case SKEW_REVERSE_KL: {
            const float over = share_of(q, rest * p + own * q), log_over = log_or_0(over);
            return {q * log_over, q * (log_over + 1.0f - own * over)};
        }
        default: {  // ALPHA_BETA
            const float alpha = own, beta = term.second, total = alpha + beta;
            const float cross = expf(total * at.log_p + beta * ratio);  // p^alpha q^beta
            const float of_teacher = expf(total * at.log_p), of_student = expf(total * at.log_q);
            const float value = alpha / total * of_teacher + beta / total * of_student - cross;
            return {value / (alpha * beta), (of_student - cross) / alpha};
        }
    }
}

// A row of logits at one temperature. Rounded before the largest is taken off, as that one was.
__device__ __forceinline__ float scaled(const Distribution& side, float logit) {
    return __fmul_rn(logit, side.factor) - side.top;
}

template <typename Stored>
struct Row {
    const Pass& pass;
    const Index n, num_rows;
    const Stored *student, *teacher;
    const Index* kept;

    __device__ __forceinline__ Row(const Pass& pass)
        : pass(pass),
          n(blockIdx.x),
          num_rows(gridDim.x),
          student((const Stored*)pass.student + n * pass.num_ids),
          teacher(pass.teacher == nullptr ? nullptr : (const Stored*)pass.teacher + n * pass.num_ids),
          kept(pass.kept + n * pass.num_kept) {}

    __device__ __forceinline__ bool is_over_kept() const { return pass.num_kept > 0; }

    __device__ __forceinline__ int id_of(int column) const { return (int)kept[column]; }

    __device__ __forceinline__ int num_columns() const { return is_over_kept() ? pass.num_kept + 1 : pass.num_ids; }

    __device__ __forceinline__ Point point(int group, int column) const {
        const State& state = desk().states[group];
        const Distribution &ours = state.sides[STUDENT], &theirs = state.sides[TEACHER];
        Point at;
        if (is_over_kept()) {
            at.log_p = pass.known[(group * num_rows + n) * (pass.num_kept + 1) + column];
            at.p = expf(at.log_p);
            if (column == pass.num_kept) {
                at.log_q = state.rest.top - ours.top + logf(state.rest.total) - ours.log_total;
                at.q = expf(at.log_q);
                return at;
            }
            column = id_of(column);
        } else {
            const float y = scaled(theirs, to_float(teacher[column]));
            at.p = expf(y) * theirs.inverse_total;
            at.log_p = y - theirs.log_total;
        }
        const float x = scaled(ours, to_float(student[column]));
        at.q = expf(x) * ours.inverse_total;
        at.log_q = x - ours.log_total;
        return at;
    }

    // g of an id from the labels of a temperature.
    __device__ __forceinline__ float of_labels(int group, int id) const {
        float g = 0.0f;
        for (int t = 0; t < pass.num_terms; t++) {
            const Term& term = pass.terms[t];
            if (term.group == group && term.kind == LABELS && term.weight != 0.0f && desk().targets[t] == id)
                g -= desk().weights[t];
        }
        return g;
    }

    // g of a column from the divergences of a temperature.
    __device__ __forceinline__ float of_divergences(int group, const Point& at) const {
        float g = 0.0f;
        for (int t = 0; t < pass.num_terms; t++) {
            const Term& term = pass.terms[t];
            if (term.group == group && term.kind != LABELS && term.weight != 0.0f)
                g += desk().weights[t] * part_of(term, at).derivative;
        }
        return g;
    }

    // Every id once: those that are kept are left out at their place and come at the end.
    __device__ __forceinline__ int num_visits() const { return pass.num_ids + pass.num_kept; }

    __device__ __forceinline__ Visit visit(int k) const {
        if (!is_over_kept()) return {k, k};
        if (k < pass.num_ids) return {is_marked(k) ? -1 : k, -1};
        return {id_of(k - pass.num_ids), k - pass.num_ids};
    }

    // The gradient of an id at all temperatures.
    __device__ __forceinline__ float gradient(Visit at) const {
        float sum = 0.0f;
        for (int group = 0; group < pass.num_groups; group++) sum += gradient_at(group, at.id, at.column);
        return sum;
    }

    // What a temperature adds to it.
    __device__ __forceinline__ float gradient_at(int group, int id, int column) const {
        const State& state = desk().states[group];
        const Distribution& ours = state.sides[STUDENT];
        float q, g = of_labels(group, id);
        if (column >= 0 && pass.groups[group].asks_teacher) {
            const Point at = point(group, column);
            q = at.q;
            g += of_divergences(group, at);
        } else {
            const float x = to_float(student[id]);
            q = expf(scaled(ours, x)) * ours.inverse_total;
            if (column < 0 && state.rest.total > 0.0f)
                g += state.of_rest * (expf(__fmul_rn(x, ours.factor) - state.rest.top) / state.rest.total);
        }
        return (g - q * state.added) * ours.factor;
    }
};

template <typename Stored>
__device__ __forceinline__ void prepare(const Row<Stored>& row) {
    const Pass& pass = row.pass;
    for (int t = threadIdx.x; t < pass.num_terms; t += blockDim.x) {
        const Term& term = pass.terms[t];
        const float of_token = term.token_weights == nullptr ? 1.0f : term.token_weights[row.n];
        desk().weights[t] = term.weight * of_token;
        desk().targets[t] = term.kind == LABELS ? (int)term.targets[row.n] : -1;
    }
    if (row.is_over_kept()) {
        for (int word = threadIdx.x; word < (pass.num_ids + 31) / 32; word += blockDim.x) marks()[word] = 0;
        __syncthreads();
        for (int k = threadIdx.x; k < pass.num_kept; k += blockDim.x) mark(row.id_of(k));
    }
    __syncthreads();
}

// The mass of a row at all temperatures, without the ids that are marked.
template <typename Stored>
__device__ __forceinline__ void weigh(const Pass& pass, const Stored* logits, Who who, bool is_over_kept, Mass (&own)[MOST_GROUPS]) {
#pragma unroll
    for (int group = 0; group < MOST_GROUPS; group++) own[group] = {LOWEST, 0.0f};
    for (int k = threadIdx.x; k < pass.num_ids; k += blockDim.x) {
        if (is_over_kept && is_marked(k)) continue;
        const float logit = to_float(logits[k]);
#pragma unroll
        for (int group = 0; group < MOST_GROUPS; group++)
            if (group < pass.num_groups) add(own[group], __fmul_rn(logit, pass.groups[group].factors[who]));
    }
}

__device__ __forceinline__ Distribution distribution(float factor, Mass mass) {
    return {factor, mass.top, logf(mass.total), 1.0f / mass.total};
}

// Both sides' distributions at all temperatures.
template <typename Stored>
__device__ __forceinline__ void spread(const Row<Stored>& row) {
    const Pass& pass = row.pass;
    Mass ours[MOST_GROUPS], theirs[MOST_GROUPS];
    weigh(pass, row.student, STUDENT, row.is_over_kept(), ours);
    if (row.teacher != nullptr) weigh(pass, row.teacher, TEACHER, false, theirs);
#pragma unroll
    for (int group = 0; group < MOST_GROUPS; group++) {
        if (group >= pass.num_groups) break;
        const Group& own = pass.groups[group];
        const Mass rest = sum_of_block(ours[group]);
        Mass all = rest, kept = {LOWEST, 0.0f}, teacher = {0.0f, 1.0f};
        if (row.is_over_kept()) {
            for (int k = threadIdx.x; k < pass.num_kept; k += blockDim.x)
                add(kept, __fmul_rn(to_float(row.student[row.id_of(k)]), own.factors[STUDENT]));
            all = sum_of(rest, sum_of_block(kept));
        }
        if (row.teacher != nullptr) teacher = sum_of_block(theirs[group]);
        if (threadIdx.x == 0) {
            State& state = desk().states[group];
            state.sides[STUDENT] = distribution(own.factors[STUDENT], all);
            state.sides[TEACHER] = distribution(own.factors[TEACHER], teacher);
            state.rest = rest;
            state.of_rest = state.added = 0.0f;
            state.doubt = 0.0f * (all.top + all.total + teacher.top + teacher.total);
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void write_value(const Pass& pass, int t, float value) {
    const Term& term = pass.terms[t];
    const float of_token = term.token_weights == nullptr ? 1.0f : term.token_weights[blockIdx.x];
    pass.values[t * pass.value_stride + blockIdx.x] = value * of_token;
}

// The values of all divergences; the sum of g, and of_rest, grow by what these add.
template <typename Stored>
__device__ __forceinline__ void compare(const Row<Stored>& row) {
    const Pass& pass = row.pass;
    for (int t = 0; t < pass.num_terms; t++) {
        const Term& term = pass.terms[t];
        if (term.kind == LABELS) continue;
        State& state = desk().states[term.group];
        Sums own = {0.0f, 0.0f};
        for (int column = threadIdx.x; column < row.num_columns(); column += blockDim.x) {
            const Sums part = part_of(term, row.point(term.group, column));
            own = sum_of(own, part);
            if (column == pass.num_kept && row.is_over_kept() && term.weight != 0.0f)
                state.of_rest += desk().weights[t] * part.derivative;
        }
        const Sums all = sum_of_block(own);
        if (threadIdx.x != 0) continue;
        if (term.weight != 0.0f) state.added += desk().weights[t] * all.derivative;
        write_value(pass, t, all.value + state.doubt);
    }
}

// The values of all labels; the sum of g grows by what these add.
template <typename Stored>
__device__ __forceinline__ void count_labels(const Row<Stored>& row) {
    const Pass& pass = row.pass;
    bool is_first = true;
    for (int t = 0; t < pass.num_terms; t++) {
        const Term& term = pass.terms[t];
        if (term.kind != LABELS) continue;
        State& state = desk().states[term.group];
        const Distribution& ours = state.sides[STUDENT];
        const int target = desk().targets[t];
        const bool is_id = 0 <= target && target < pass.num_ids;
        const float logit = is_id ? to_float(row.student[target]) : __int_as_float(0x7FC00000);
        const float value = ours.log_total - scaled(ours, logit) + state.doubt;
        if (term.weight != 0.0f) state.added -= desk().weights[t];
        write_value(pass, t, value);
        if (is_first && pass.label_logprobs != nullptr) pass.label_logprobs[row.n] = -value;
        is_first = false;
    }
}

template <typename Stored>
__device__ __forceinline__ void find_entropy(const Row<Stored>& row) {
    Sums own = {0.0f, 0.0f};
    for (int column = threadIdx.x; column < row.num_columns(); column += blockDim.x) {
        const Point at = row.point(0, column);
        own.value -= at.p == 0.0f ? 0.0f : at.p * at.log_p;
    }
    const Sums all = sum_of_block(own);
    if (threadIdx.x == 0) row.pass.entropies[row.n] = all.value + desk().states[0].doubt;
}

// The power of two at or below a size, so that dividing by it costs no digits.
__device__ __forceinline__ float power_of_two(float size) {
    const float least = 1.1754943508222875e-38f;
    return __int_as_float(__float_as_int(size > least ? size : least) & 0x7F800000);
}

// The gradient, in float16 after a walk that finds its largest entry. What a thread writes over, it alone has read.
template <typename Stored>
__device__ __forceinline__ void form_gradient(const Row<Stored>& row) {
    Stored* gradient = (Stored*)row.pass.gradient + row.n * row.pass.num_ids;
    float scale = 1.0f;
    for (int walk = IS_NARROW<Stored> ? 0 : 1; walk < 2; walk++) {
        Largest largest = {0.0f};
        for (int k = threadIdx.x; k < row.num_visits(); k += blockDim.x) {
            const Visit at = row.visit(k);
            if (at.id < 0) continue;
            const float entry = row.gradient(at);
            if (walk == 0)
                largest = sum_of(largest, {fabsf(entry)});
            else
                store(gradient + at.id, entry / scale);
        }
        if (walk == 0) scale = power_of_two(sum_of_block(largest).size);
    }
    if (threadIdx.x == 0) row.pass.row_scales[row.n] = scale;
}

template <typename Stored>
__device__ __forceinline__ void solve(const Pass& pass) {
    const Row<Stored> row(pass);
    prepare(row);
    spread(row);
    if (pass.entropies != nullptr) find_entropy(row);
    compare(row);
    if (threadIdx.x == 0) count_labels(row);
    __syncthreads();
    if (pass.gradient != nullptr) form_gradient(row);
}

// Grid: positions.
extern "C" __global__ void __launch_bounds__(512) solve_float32(Pass pass) { solve<float>(pass); }

extern "C" __global__ void __launch_bounds__(512) solve_float16(Pass pass) { solve<Half>(pass); }

extern "C" __global__ void __launch_bounds__(512) solve_bfloat16(Pass pass) { solve<BFloat16>(pass); }
