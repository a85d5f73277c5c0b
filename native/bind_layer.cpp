// The Python binding of what a layer is run with. What the calls of a step share, layers, caches and batches,
// is unpacked when it is made; what is left to compare in a call is compared here.
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"

template <class T> using Array2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

// Keys and values of one sequence in one layer.
struct KV {
    Array<uint8_t> data;
    em_kv kv;
    int capacity;

    KV(Array<uint8_t> given, int kind, int d, int capacity)
        : data(std::move(given)), kv{data.data(), kind, dim(data, 0), d, dim(data, 1)}, capacity(capacity) {}
};

// Rows of some sequences and all arrays that a layer reads and writes.
struct Batch {
    F32 x, h, weights, mlp, mlp_gate;
    ConstF32 cos, sin;
    Array<int32_t> ids;
    std::vector<std::tuple<int, int>> rows; // of each sequence: its next position, the rows that it has here

    bool fits(const em_layer &l) const {
        return dim(x, 1) == l.hidden && 2 * dim(cos, 1) == l.d && (!l.router || dim(ids, 1) == l.slots) &&
               (!l.mlp || mlp.size() == x.size()) && (!l.shared_router || dim(mlp_gate, 0) == dim(x, 0));
    }
};

using Floats = std::map<std::string, ConstF32>;
using Matrices = std::map<std::string, const em_matrix *>;

// Keeps the arrays that it points into; the memory of the matrices is its user's to keep.
struct Layer {
    em_layer l{};
    Floats floats;

    Layer(int heads, int kv_heads, int d, int window, float scale, float eps, float clip, float residual,
          int slots, bool normalize, Floats given, const Matrices &matrices)
        : floats(std::move(given)) {
        l.hidden = static_cast<int>(floats.at("input_norm").size());
        l.heads = heads, l.kv_heads = kv_heads, l.d = d;
        l.window = window, l.scale = scale, l.eps = eps, l.clip = clip, l.residual = residual;
        l.input_norm = find("input_norm"), l.post_norm = find("post_norm");
        l.q_norm = find("q_norm", &l.q_norm_cols), l.k_norm = find("k_norm", &l.k_norm_cols);
        l.q_bias = find("q_bias"), l.k_bias = find("k_bias"), l.v_bias = find("v_bias");
        l.o_bias = find("o_bias");
        l.router = find("router", &l.experts), l.shared_router = find("shared_router");
        l.slots = slots, l.normalize = normalize;
        l.q = *matrices.at("q"), l.k = *matrices.at("k"), l.v = *matrices.at("v"), l.o = *matrices.at("o");
        if (matrices.contains("gate")) {
            l.gate = *matrices.at("gate"), l.up = *matrices.at("up"), l.down = *matrices.at("down");
            l.mlp = l.gate.rows;
        }
    }

    // A tensor, NULL if there is none, and the length of its first axis.
    const float *find(const char *name, int *length = nullptr) const {
        const auto at = floats.find(name);
        if (at == floats.end()) return nullptr;
        if (length) *length = dim(at->second, 0);
        return at->second.data();
    }
};

// The experts of a layer.
struct Mixture {
    Array<const uint64_t> segments;
    Array<const int64_t> offsets;
    em_mixture_of of;

    Mixture(Array<const uint64_t> given, Array<const int64_t> at, int hidden, int intermediate, int ahead,
            int group_units)
        : segments(std::move(given)), offsets(std::move(at)),
          of{{offsets.data(), dim(offsets, 1), hidden, intermediate, ahead, group_units},
             segments.data(),
             dim(segments, 0),
             dim(segments, 1)} {}
};

// False where what a call is given does not fit the layer.
bool run_layer(const Layer &layer, Pool &pool, const Batch &b, const Array2<const float> &add,
               const std::vector<const KV *> &places) {
    const em_layer &l = layer.l;
    const bool adds = add.is_valid();
    if (!b.fits(l) || places.size() != b.rows.size() ||
        (adds && (dim(add, 0) != dim(b.x, 0) || dim(add, 1) != l.hidden)))
        return false;
    std::vector<em_span> spans;
    spans.reserve(places.size());
    for (size_t i = 0; i < places.size(); i++) {
        const KV &at = *places[i];
        const auto [start, count] = b.rows[i];
        if (at.kv.heads != l.kv_heads || at.kv.d != l.d || start > at.capacity - count) return false;
        spans.push_back({at.kv, start, count});
    }
    const em_routed out = {b.h.data(), b.ids.data(), b.weights.data(), b.mlp.data(), b.mlp_gate.data()};
    nb::gil_scoped_release nogil;
    check(em_layer_run(pool.p, &l, b.x.data(), adds ? add.data() : nullptr, dim(b.x, 0), b.cos.data(),
                       b.sin.data(), spans.data(), static_cast<int>(spans.size()), &out));
    return true;
}

// False where shapes do not fit, or there is no such expert.
bool run_mixture(const Mixture &m, Pool &pool, const Array2<const float> &x, const Array2<const int32_t> &ids,
                 const Array2<const int32_t> &levels, const Array2<const float> &weights, const F32 &y) {
    const int n = dim(x, 0), k = dim(ids, 1);
    if (dim(x, 1) != m.of.record.hidden || dim(ids, 0) != n || dim(levels, 0) != n || dim(levels, 1) != k ||
        dim(weights, 0) != n || dim(weights, 1) != k)
        return false;
    nb::gil_scoped_release nogil;
    const int status =
        em_mixture(pool.p, &m.of, x.data(), n, k, ids.data(), levels.data(), weights.data(), y.data());
    check(status);
    return status == EM_OK;
}

// The number of pairs, or below zero where there is no such expert or no place for its pairs.
int run_part(const Mixture &m, Pool &pool, const Array2<const float> &x, const Array2<const int32_t> &ids,
             const Array2<const int32_t> &levels, const std::vector<int32_t> &chosen, int done,
             const Array2<int32_t> &position, const Array2<float> &pair_out) {
    const int n = dim(x, 0), k = dim(ids, 1);
    nb::gil_scoped_release nogil;
    const int status =
        em_mixture_part(pool.p, &m.of, x.data(), n, k, ids.data(), levels.data(), chosen.data(),
                        static_cast<int>(chosen.size()), done, position.data(), pair_out.data());
    check(status);
    return status;
}

} // namespace

void bind_layer(nb::module_ &m) {
    nb::class_<KV>(m, "KV").def(nb::init<Array<uint8_t>, int, int, int>(), "data"_a.noconvert(), "kind"_a,
                                "d"_a, "capacity"_a);

    nb::class_<Batch>(m, "Batch")
        .def(
            "__init__",
            [](Batch *b, F32 x, ConstF32 cos, ConstF32 sin, F32 h, Array<int32_t> ids, F32 weights, F32 mlp,
               F32 mlp_gate, std::vector<std::tuple<int, int>> rows) {
                new (b) Batch{x, h, weights, mlp, mlp_gate, cos, sin, ids, std::move(rows)};
            },
            "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "h"_a.noconvert(),
            "ids"_a.noconvert(), "weights"_a.noconvert(), "mlp"_a.noconvert(), "mlp_gate"_a.noconvert(),
            "rows"_a);

    nb::class_<Layer>(m, "Layer")
        .def(nb::init<int, int, int, int, float, float, float, float, int, bool, Floats, Matrices>(),
             "heads"_a, "kv_heads"_a, "d"_a, "window"_a, "scale"_a, "eps"_a, "clip"_a, "residual"_a,
             "slots"_a, "normalize"_a, "floats"_a.noconvert(), "matrices"_a)
        .def("run", &run_layer, "pool"_a, "batch"_a, "add"_a.noconvert().none(), "places"_a);

    nb::class_<Mixture>(m, "Mixture")
        .def(nb::init<Array<const uint64_t>, Array<const int64_t>, int, int, int, int>(),
             "segments"_a.noconvert(), "offsets"_a.noconvert(), "hidden"_a, "intermediate"_a, "ahead"_a,
             "group_units"_a)
        .def("run", &run_mixture, "pool"_a, "x"_a.noconvert(), "ids"_a.noconvert(), "levels"_a.noconvert(),
             "weights"_a.noconvert(), "y"_a.noconvert())
        .def("part", &run_part, "pool"_a, "x"_a.noconvert(), "ids"_a.noconvert(), "levels"_a.noconvert(),
             "chosen"_a, "done"_a, "position"_a.noconvert(), "pair_out"_a.noconvert());
}
