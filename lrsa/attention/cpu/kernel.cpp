// Lag-Relative Sparse Attention on a CPU: every query attends to the keys that it sees, and to nothing else.
//
// A task is some queries of one window with all query heads of one KV head: they all see the sink, the tokens kept of
// far windows and the window before; of their own window each sees up to itself. The visible keys are gathered by
// position, a block at a time, and multiplied with the queries, a panel at a time, as in flash attention. The scores of
// a panel lie keys by queries, so that a vector holds one key's scores for several queries and the softmax needs no sum
// across a vector. What pads a panel behind its last query is zero, weighs nothing and is never written back.
//
// The tensors hold Real, float or double, or with float also bf16.
// Shapes: B batch, H query heads, G KV heads, T queries, S tokens of a row, D head dim.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

constexpr int PANEL = 64;    // queries multiplied at a time
constexpr int BLOCK = 96;    // keys gathered at a time
constexpr int ROWS = 1024;   // queries of all heads in a task, at most

struct Bf16 {
    uint16_t bits;

    Bf16(float x) {
        uint32_t wide;
        std::memcpy(&wide, &x, 4);
        bits = x != x ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;  // to the nearest, ties to even
    }

    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};

struct Tensor {  // [B, heads, tokens, D], its channels next to each other
    void *data;
    int64_t strides[3];
};

struct Problem {
    Tensor query, key, value, out, grad, grad_query;
    Real *lse;                         // [B, G, T, H / G], as a power of 2
    Real *grad_key, *grad_value;       // [parts, B, G, S, D]
    Real *scratch;                     // of every thread
    const Real *sinks;                 // [H], a further score of every query of a head; null for none
    const int64_t *index;              // kept positions, [B, G, windows, top_k]
    int64_t batch, heads, kv_heads, tokens, length, channels;
    int64_t sink_size, lag_size, top_k, windows, parts, threads, bf16;
    double scale, softcap;             // softcap 0 for none

    int64_t group() const { return heads / kv_heads; }
    int64_t padded() const { return (channels + LANES - 1) / LANES * LANES; }
};

// -------------------------------------------------------------------------------------------------------------- tasks

struct Task {
    int64_t head;         // b * G + g
    int64_t first, last;  // positions of its queries in the row
};

static std::vector<Task> tasks_of(const Problem &p, int64_t head) {
    std::vector<Task> tasks;
    const int64_t most = std::max<int64_t>(ROWS / p.group(), 1), dense = p.sink_size + 2 * p.lag_size;
    for (int64_t first = p.length - p.tokens, last; first < p.length; first = last) {
        int64_t stop = first < dense ? dense : first + p.lag_size - (first - p.sink_size) % p.lag_size;
        last = std::min({first + most, stop, p.length});
        tasks.push_back({head, first, last});
    }
    return tasks;
}

struct Keys {
    std::vector<int64_t> positions;  // of all keys that the task's last query sees
    int64_t far = 0;                 // so many of them, from the first on, are seen by all its queries
};

static Keys keys_of(const Problem &p, const Task &task) {
    Keys keys;
    int64_t near = 0;
    if (task.first >= p.sink_size + 2 * p.lag_size) {
        const int64_t before = (task.first - p.sink_size) / p.lag_size - 1;  // windows before the previous one
        const int64_t *kept = p.index + task.head * p.windows * p.top_k;
        for (int64_t position = 0; position < p.sink_size; position++) keys.positions.push_back(position);
        keys.positions.insert(keys.positions.end(), kept, kept + before * p.top_k);
        keys.far = keys.positions.size();
        near = p.sink_size + before * p.lag_size;
    }
    for (int64_t position = near; position < task.last; position++) keys.positions.push_back(position);
    return keys;
}

struct Panel {
    int rows;                   // of PANEL that are real
    int64_t positions[PANEL];   // of the queries in the row, not descending
    int64_t tokens[PANEL];      // their numbers among the T
    int64_t heads[PANEL];
    int64_t places[PANEL];      // in the log-sum-exp

    // How many of `count` keys from `start` on its last query sees.
    int seen(const Keys &keys, int64_t start, int count) const {
        while (count && start + count > keys.far && keys.positions[start + count - 1] > positions[PANEL - 1]) count--;
        return count;
    }

    // Scores [count, PANEL] of keys behind a query become -inf.
    void hide(const Keys &keys, int64_t start, int count, Real *scores) const {
        for (int c = 0; c < count; c++) {
            int64_t key = keys.positions[start + c];
            if (start + c < keys.far || key <= positions[0]) continue;
            for (int r = 0; r < PANEL; r++)
                if (key > positions[r]) scores[c * PANEL + r] = -std::numeric_limits<Real>::infinity();
        }
    }
};

static std::vector<Panel> panels_of(const Problem &p, const Task &task) {
    const int64_t rows = (task.last - task.first) * p.group();
    std::vector<Panel> panels((rows + PANEL - 1) / PANEL);
    for (size_t i = 0; i < panels.size(); i++) {
        panels[i].rows = std::min<int64_t>(rows - i * PANEL, PANEL);
        for (int r = 0; r < PANEL; r++) {
            int64_t row = std::min<int64_t>(i * PANEL + r, rows - 1), member = row % p.group();
            panels[i].positions[r] = task.first + row / p.group();
            panels[i].tokens[r] = panels[i].positions[r] - (p.length - p.tokens);
            panels[i].heads[r] = task.head % p.kv_heads * p.group() + member;
            panels[i].places[r] = (task.head * p.tokens + panels[i].tokens[r]) * p.group() + member;
        }
    }
    return panels;
}

template <class Element>
static Element *row_of(const Problem &p, const Tensor &x, const Task &task, int64_t head, int64_t token) {
    return static_cast<Element *>(x.data) + task.head / p.kv_heads * x.strides[0] + head * x.strides[1] + token * x.strides[2];
}

// Keys or values of `count` positions as [count, padded], 0 behind the channels.
template <class Element>
static void gather(const Problem &p, const Tensor &x, const Task &task, const int64_t *positions, int count, Real *rows) {
    const int64_t padded = p.padded();
    for (int c = 0; c < count; c++) {
        const Element *from = row_of<Element>(p, x, task, task.head % p.kv_heads, positions[c]);
        for (int64_t d = 0; d < p.channels; d++) rows[c * padded + d] = Real(from[d]);
        for (int64_t d = p.channels; d < padded; d++) rows[c * padded + d] = 0;
    }
}

// A panel's rows times `factor` as [PANEL, padded], 0 behind the channels, and as [D, PANEL] times `turned_factor`.
template <class Element>
static void take(const Problem &p, const Tensor &x, const Task &task, const Panel &panel, Real *rows, Real factor,
                 Real *turned, Real turned_factor) {
    const int64_t padded = p.padded();
    for (int r = 0; r < PANEL; r++) {
        const Element *from = row_of<Element>(p, x, task, panel.heads[r], panel.tokens[r]);
        const bool real = r < panel.rows;
        for (int64_t d = 0; d < padded; d++) {
            Real element = real && d < p.channels ? Real(from[d]) : Real(0);
            if (rows) rows[r * padded + d] = element * factor;
            if (d < p.channels) turned[d * PANEL + r] = element * turned_factor;
        }
    }
}

// The way back: [D, PANEL] times the factor of each query.
template <class Element>
static void give(const Problem &p, const Tensor &x, const Task &task, const Panel &panel, const Real *turned,
                 const Real *factors) {
    for (int r = 0; r < panel.rows; r++) {
        Element *to = row_of<Element>(p, x, task, panel.heads[r], panel.tokens[r]);
        for (int64_t d = 0; d < p.channels; d++) to[d] = Element(turned[d * PANEL + r] * factors[r]);
    }
}

// --------------------------------------------------------------------------------------------------- the two attentions

constexpr double LOG2E = 1.44269504088896340736;

// Scores, as powers of 2, become cap * tanh(score / cap); their gradients, if any, what the backward multiplies weights with.
static void cap_scores(int count, Real cap, Real *scores, Real *grads, const Real *delta) {
    for (int i = 0; i < count * PANEL; i += LANES) {
        Vec power = vec(scores + i) * Real(2 * LOG2E) / cap;
        Vec slope = 2 / (exp2(power > 60 ? splat(60) : power) + 1);  // 1 - tanh
        vec(scores + i) = cap - cap * slope;
        if (grads) vec(grads + i) = (vec(grads + i) - vec(delta + i % PANEL)) * slope * (2 - slope);
    }
}

struct Scratch {  // the parts of a thread's scratch, one after the other
    Real *next, *end;

    Real *take(int64_t size) {
        Real *taken = next;
        if (size > end - next) std::abort();  // scratch_size and its users disagree
        next += size;
        return taken;
    }
};

// All that a thread needs, in elements: the backward's parts, which are more than the forward's.
static int64_t scratch_size(const Problem &p) {
    const int64_t queries = std::max<int64_t>(ROWS, p.group()), panels = (queries + PANEL - 1) / PANEL;
    return panels * PANEL * (5 * p.padded() + 2) + PANEL * p.padded() + 4 * BLOCK * p.padded() + 2 * BLOCK * PANEL;
}

template <class Element>
static void forward(const Problem &p, const Task &task, Scratch scratch) {
    const int64_t padded = p.padded(), size = p.channels * PANEL;
    const Keys keys = keys_of(p, task);
    const std::vector<Panel> panels = panels_of(p, task);
    const int64_t count = panels.size();
    Real *query = scratch.take(count * size), *out = scratch.take(count * size);
    Real *top = scratch.take(count * PANEL), *sum = scratch.take(count * PANEL);
    Real *key = scratch.take(BLOCK * padded), *value = scratch.take(BLOCK * padded), *scores = scratch.take(BLOCK * PANEL);
    std::fill(out, out + count * size, Real(0));
    std::fill(sum, sum + count * PANEL, Real(0));
    std::fill(top, top + count * PANEL, -std::numeric_limits<Real>::infinity());
    for (int64_t i = 0; i < count; i++) {
        take<Element>(p, p.query, task, panels[i], nullptr, 0, query + i * size, p.scale * LOG2E);
        for (int r = 0; p.sinks && r < PANEL; r++) {  // a key that comes first: its value adds nothing to the output
            top[i * PANEL + r] = p.sinks[panels[i].heads[r]] * Real(LOG2E);
            sum[i * PANEL + r] = 1;
        }
    }
    for (int64_t start = 0, total = keys.positions.size(); start < total; start += BLOCK) {
        const int block = std::min<int64_t>(BLOCK, total - start);
        gather<Element>(p, p.key, task, &keys.positions[start], block, key);
        gather<Element>(p, p.value, task, &keys.positions[start], block, value);
        for (int64_t i = 0; i < count; i++) {
            const int n = panels[i].seen(keys, start, block);
            if (!n) continue;
            multiply<false>(n, PANEL, p.channels, key, padded, query + i * size, PANEL, scores, PANEL, false);
            if (p.softcap) cap_scores(n, p.softcap * LOG2E, scores, nullptr, nullptr);
            panels[i].hide(keys, start, n, scores);
            for (int r = 0; r < PANEL; r += LANES) {
                Vec old = vec(top + i * PANEL + r), highest = old;
                for (int c = 0; c < n; c++) {
                    Vec score = vec(scores + c * PANEL + r);
                    highest = score > highest ? score : highest;
                }
                Vec shrink = exp2(old - highest), weights = vec(sum + i * PANEL + r) * shrink;
                for (int c = 0; c < n; c++) {
                    Vec weight = exp2(vec(scores + c * PANEL + r) - highest);
                    vec(scores + c * PANEL + r) = weight;
                    weights += weight;
                }
                vec(top + i * PANEL + r) = highest;
                vec(sum + i * PANEL + r) = weights;
                for (int64_t d = 0; d < p.channels; d++) vec(out + i * size + d * PANEL + r) *= shrink;
            }
            multiply<true>(p.channels, PANEL, n, value, padded, scores, PANEL, out + i * size, PANEL, true);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        Real *weights = sum + i * PANEL;
        for (int r = 0; r < PANEL; r++) {
            if (r < panels[i].rows) p.lse[panels[i].places[r]] = top[i * PANEL + r] + std::log2(weights[r]);
            weights[r] = 1 / weights[r];
        }
        give<Element>(p, p.out, task, panels[i], out + i * size, weights);
    }
}

template <class Element>
static void backward(const Problem &p, const Task &task, Real *grad_key, Real *grad_value, Scratch scratch) {
    const int64_t padded = p.padded(), size = p.channels * PANEL, rows = padded * PANEL;
    const Keys keys = keys_of(p, task);
    const std::vector<Panel> panels = panels_of(p, task);
    const int64_t count = panels.size();
    Real *query = scratch.take(count * rows), *query_turned = scratch.take(count * size);
    Real *grad = scratch.take(count * rows), *grad_turned = scratch.take(count * size);
    Real *grad_query = scratch.take(count * size), *out = scratch.take(rows);
    Real *lse = scratch.take(count * PANEL), *delta = scratch.take(count * PANEL);
    Real *key = scratch.take(BLOCK * padded), *value = scratch.take(BLOCK * padded);
    Real *key_part = scratch.take(BLOCK * padded), *value_part = scratch.take(BLOCK * padded);
    Real *weights = scratch.take(BLOCK * PANEL), *scores = scratch.take(BLOCK * PANEL);
    std::fill(grad_query, grad_query + count * size, Real(0));
    for (int64_t i = 0; i < count; i++) {
        take<Element>(p, p.query, task, panels[i], query + i * rows, p.scale, query_turned + i * size, p.scale * LOG2E);
        take<Element>(p, p.grad, task, panels[i], grad + i * rows, 1, grad_turned + i * size, 1);
        take<Element>(p, p.out, task, panels[i], nullptr, 0, out, 1);
        for (int r = 0; r < PANEL; r++) {
            lse[i * PANEL + r] = r < panels[i].rows ? p.lse[panels[i].places[r]] : std::numeric_limits<Real>::infinity();
            delta[i * PANEL + r] = 0;
        }
        for (int64_t d = 0; d < p.channels; d++)
            for (int r = 0; r < PANEL; r++)
                delta[i * PANEL + r] += out[d * PANEL + r] * grad_turned[i * size + d * PANEL + r];
    }
    for (int64_t start = 0, total = keys.positions.size(); start < total; start += BLOCK) {
        const int block = std::min<int64_t>(BLOCK, total - start);
        gather<Element>(p, p.key, task, &keys.positions[start], block, key);
        gather<Element>(p, p.value, task, &keys.positions[start], block, value);
        std::fill(key_part, key_part + BLOCK * padded, Real(0));
        std::fill(value_part, value_part + BLOCK * padded, Real(0));
        for (int64_t i = 0; i < count; i++) {
            const int n = panels[i].seen(keys, start, block);
            if (!n) continue;
            multiply<false>(n, PANEL, p.channels, key, padded, query_turned + i * size, PANEL, weights, PANEL, false);
            multiply<false>(n, PANEL, p.channels, value, padded, grad_turned + i * size, PANEL, scores, PANEL, false);
            if (p.softcap) cap_scores(n, p.softcap * LOG2E, weights, scores, delta + i * PANEL);
            panels[i].hide(keys, start, n, weights);
            for (int r = 0; r < PANEL; r += LANES) {
                const Vec norm = vec(lse + i * PANEL + r), mean = p.softcap ? Vec{} : vec(delta + i * PANEL + r);
                for (int c = 0; c < n; c++) {
                    Vec weight = exp2(vec(weights + c * PANEL + r) - norm);
                    vec(weights + c * PANEL + r) = weight;
                    vec(scores + c * PANEL + r) = weight * (vec(scores + c * PANEL + r) - mean);
                }
            }
            multiply<false>(n, padded, PANEL, weights, PANEL, grad + i * rows, padded, value_part, padded, true);
            multiply<false>(n, padded, PANEL, scores, PANEL, query + i * rows, padded, key_part, padded, true);
            multiply<true>(p.channels, PANEL, n, key, padded, scores, PANEL, grad_query + i * size, PANEL, true);
        }
        for (int c = 0; c < block; c++)
            for (int64_t d = 0, at = keys.positions[start + c] * p.channels; d < p.channels; d++) {
                grad_key[at + d] += key_part[c * padded + d];
                grad_value[at + d] += value_part[c * padded + d];
            }
    }
    Real factors[PANEL];
    std::fill(factors, factors + PANEL, Real(p.scale));
    for (int64_t i = 0; i < count; i++) give<Element>(p, p.grad_query, task, panels[i], grad_query + i * size, factors);
}

// ------------------------------------------------------------------------------------------------------------ threads

// Calls work(i, scratch) for every i below `count`.
template <class Work>
static void in_parallel(const Problem &p, int64_t count, Work work) {
    if (!count) return;
    const int64_t size = scratch_size(p);
    std::atomic<int64_t> next{0};
    auto run = [&](int64_t thread) {
        for (int64_t i; (i = next++) < count;) work(i, Scratch{p.scratch + thread * size, p.scratch + (thread + 1) * size});
    };
    const int threads = std::min(p.threads, count);
#ifdef _OPENMP  // the threads that PyTorch has already: those of its last operator still spin, and would be in the way
    #pragma omp parallel num_threads(threads)
    run(omp_get_thread_num());
#else
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
    run(0);
    for (auto &other : others) other.join();
#endif
}

extern "C" int64_t lrsa_scratch(const Problem *p) { return scratch_size(*p) * p->threads; }

extern "C" void lrsa_forward(const Problem *p) {
    std::vector<Task> tasks;
    for (int64_t head = 0; head < p->batch * p->kv_heads; head++)
        for (const Task &task : tasks_of(*p, head)) tasks.push_back(task);
    // The longest first, so that no thread is left with one at the end.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task &a, const Task &b) { return a.first > b.first; });
    in_parallel(*p, tasks.size(), [&](int64_t i, Scratch scratch) {
        p->bf16 ? forward<Bf16>(*p, tasks[i], scratch) : forward<Real>(*p, tasks[i], scratch);
    });
}

// Who adds to a part of the keys' gradients, and in which order, does not depend on the threads' timing.
extern "C" void lrsa_backward(const Problem *p) {
    const int64_t heads = p->batch * p->kv_heads;
    in_parallel(*p, heads * p->parts, [&](int64_t i, Scratch scratch) {
        Real *grad_key = p->grad_key + i * p->length * p->channels, *grad_value = p->grad_value + i * p->length * p->channels;
        const std::vector<Task> tasks = tasks_of(*p, i % heads);
        for (size_t t = i / heads; t < tasks.size(); t += p->parts)
            p->bf16 ? backward<Bf16>(*p, tasks[t], grad_key, grad_value, scratch)
                    : backward<Real>(*p, tasks[t], grad_key, grad_value, scratch);
    });
}
