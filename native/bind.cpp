// The Python binding: unpacks arrays, releases the GIL, calls the C core. Shapes are checked in
// edgemoe/kernels.py; dtypes and contiguity here too (noconvert: nothing is ever copied).
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <string>
#include <vector>

#include "bind.h"

NB_MODULE(_native, m) {
    bind_reader(m);
    bind_layer(m);

    nb::class_<Pool>(m, "Pool")
        .def(nb::init<int>(), "threads"_a)
        .def_prop_ro("threads", [](const Pool &p) { return em_pool_threads(p.p); })
        .def_prop_ro("scratch_bytes", [](const Pool &p) { return em_pool_scratch_bytes(p.p); });

    nb::class_<em_matrix>(m, "Matrix")
        .def_ro("rows", &em_matrix::rows)
        .def_ro("cols", &em_matrix::cols)
        .def_ro("level", &em_matrix::level);

    m.def("isa_names", [] {
        std::vector<std::string> names;
        for (int i = 0; i < em_isa_count(); i++)
            if (em_isa_at(i)->supported()) names.emplace_back(em_isa_at(i)->name);
        return names;
    });
    m.def("isa", [] { return std::string(em_isa_current()->name); });
    m.def("set_isa", [](const std::string &name) {
        const em_isa *isa = em_isa_find(name.c_str());
        if (isa) em_isa_set(isa);
        return isa != nullptr;
    });

    m.def(
        "crc32c",
        [](Array<const uint8_t> data, uint32_t seed) {
            nb::gil_scoped_release nogil;
            return em_crc32c(seed, data.data(), data.size());
        },
        "data"_a.noconvert(), "seed"_a);

    m.def(
        "matrix",
        [](Array<const uint64_t> segments, Array<const int64_t> offsets, int index, int level, int ahead,
           int rows, int cols, int group_units) {
            return em_matrix_at(segments.data(), offsets.data() + 2 * index, 2 * dim(offsets, 1), level,
                                ahead, rows, cols, group_units);
        },
        "segments"_a.noconvert(), "offsets"_a.noconvert(), "index"_a, "level"_a, "ahead"_a, "rows"_a,
        "cols"_a, "group_units"_a);

    m.def(
        "linear",
        [](Pool &pool, ConstF32 x, const std::vector<em_matrix *> &w, const std::vector<F32> &y) {
            std::vector<float *> out;
            out.reserve(y.size());
            for (const auto &a : y) out.push_back(a.data());
            nb::gil_scoped_release nogil;
            check(em_linear(pool.p, x.data(), dim(x, 0), w.data(), out.data(), static_cast<int>(w.size())));
        },
        "pool"_a, "x"_a.noconvert(), "w"_a, "y"_a.noconvert());

    m.def(
        "accumulate",
        [](Pool &pool, ConstF32 x, const em_matrix &w, Array<int8_t> q, F32 scale, Array<int32_t> out) {
            nb::gil_scoped_release nogil;
            check(em_accumulate(pool.p, x.data(), dim(x, 0), &w, q.data(), scale.data(), out.data()));
        },
        "pool"_a, "x"_a.noconvert(), "w"_a, "q"_a.noconvert(), "scale"_a.noconvert(), "out"_a.noconvert());

    m.def(
        "linear_f32",
        [](Pool &pool, ConstF32 x, ConstF32 w, F32 y) {
            nb::gil_scoped_release nogil;
            em_linear_f32(pool.p, x.data(), dim(x, 0), w.data(), dim(w, 0), dim(w, 1), y.data());
        },
        "pool"_a, "x"_a.noconvert(), "w"_a.noconvert(), "y"_a.noconvert());

    m.def(
        "decode_rows",
        [](const em_matrix &w, Array<const int64_t> ids, F32 out) {
            nb::gil_scoped_release nogil;
            em_decode_rows(&w, ids.data(), dim(ids, 0), out.data());
        },
        "w"_a, "ids"_a.noconvert(), "out"_a.noconvert());

    m.def(
        "rmsnorm",
        [](Pool &pool, ConstF32 x, ConstF32 w, float eps, F32 y) {
            nb::gil_scoped_release nogil;
            em_rmsnorm(pool.p, x.data(), w.data(), dim(x, 0), dim(x, 1), eps, y.data());
        },
        "pool"_a, "x"_a.noconvert(), "w"_a.noconvert(), "eps"_a, "y"_a.noconvert());

    m.def(
        "silu_mul",
        [](F32 gate, ConstF32 up) {
            nb::gil_scoped_release nogil;
            em_isa_current()->silu_mul(gate.data(), up.data(), static_cast<int>(up.size()));
        },
        "gate"_a.noconvert(), "up"_a.noconvert());

    m.def(
        "gated_add",
        [](F32 y, ConstF32 gate, ConstF32 x) {
            nb::gil_scoped_release nogil;
            em_gated_add(y.data(), gate.data(), x.data(), dim(y, 0), dim(y, 1));
        },
        "y"_a.noconvert(), "gate"_a.noconvert(), "x"_a.noconvert());

    m.def(
        "rope",
        [](Pool &pool, F32 x, ConstF32 cos, ConstF32 sin) {
            nb::gil_scoped_release nogil;
            em_rope(pool.p, x.data(), dim(x, 0), dim(x, 1), dim(x, 2), cos.data(), sin.data());
        },
        "pool"_a, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert());

    m.def(
        "route",
        [](ConstF32 logits, bool normalize, Array<int32_t> ids, F32 weights) {
            nb::gil_scoped_release nogil;
            em_route(logits.data(), dim(logits, 0), dim(logits, 1), dim(ids, 1), normalize, ids.data(),
                     weights.data());
        },
        "logits"_a.noconvert(), "normalize"_a, "ids"_a.noconvert(), "weights"_a.noconvert());

    m.def(
        "experts",
        [](Pool &pool, ConstF32 x, Array<const uint64_t> segments, Array<const int64_t> offsets,
           Array<const int32_t> levels, Array<const int32_t> first_pair, Array<const int32_t> pair_token,
           int intermediate, int ahead, int group_units, F32 pair_out) {
            const em_record record = {offsets.data(), dim(offsets, 1), dim(x, 1),
                                      intermediate,   ahead,           group_units};
            std::vector<em_job> jobs(levels.shape(0));
            for (size_t j = 0; j < jobs.size(); j++) {
                const int *first = first_pair.data() + j;
                jobs[j] = em_job_at(&record, segments.data() + j * segments.shape(1), levels.data()[j]);
                jobs[j].first = first[0];
                jobs[j].count = first[1] - first[0];
            }
            nb::gil_scoped_release nogil;
            check(em_experts(pool.p, x.data(), dim(x, 0), jobs.data(), static_cast<int>(jobs.size()),
                             pair_token.data(), dim(pair_token, 0), pair_out.data()));
        },
        "pool"_a, "x"_a.noconvert(), "segments"_a.noconvert(), "offsets"_a.noconvert(),
        "levels"_a.noconvert(), "first_pair"_a.noconvert(), "pair_token"_a.noconvert(), "intermediate"_a,
        "ahead"_a, "group_units"_a, "pair_out"_a.noconvert());

    m.def(
        "combine",
        [](Pool &pool, ConstF32 pair_out, Array<const int32_t> position, ConstF32 weights, F32 y) {
            nb::gil_scoped_release nogil;
            em_combine(pool.p, pair_out.data(), position.data(), weights.data(), dim(position, 0),
                       dim(position, 1), dim(y, 1), y.data());
        },
        "pool"_a, "pair_out"_a.noconvert(), "position"_a.noconvert(), "weights"_a.noconvert(),
        "y"_a.noconvert());

    m.def("kv_block_bytes", &em_kv_block_bytes, "kind"_a, "d"_a);

    m.def(
        "kv_write",
        [](Pool &pool, Array<uint8_t> data, int kind, ConstF32 k, ConstF32 v, int start) {
            const em_kv kv = {data.data(), kind, dim(k, 1), dim(k, 2), dim(data, 1)};
            nb::gil_scoped_release nogil;
            em_kv_write(pool.p, &kv, k.data(), v.data(), dim(k, 0), start);
        },
        "pool"_a, "data"_a.noconvert(), "kind"_a, "k"_a.noconvert(), "v"_a.noconvert(), "start"_a);

    m.def(
        "attention",
        [](Pool &pool, ConstF32 q, Array<uint8_t> data, int kind, int start, int window, float scale,
           ConstF32 sinks, F32 out) {
            const em_kv kv = {data.data(), kind, dim(data, 0), dim(q, 2), dim(data, 1)};
            nb::gil_scoped_release nogil;
            check(em_attention(pool.p, q.data(), &kv, dim(q, 0), dim(q, 1), start, window, scale,
                               sinks.size() ? sinks.data() : nullptr, out.data()));
        },
        "pool"_a, "q"_a.noconvert(), "data"_a.noconvert(), "kind"_a, "start"_a, "window"_a, "scale"_a,
        "sinks"_a.noconvert(), "out"_a.noconvert());

    m.def(
        "stream_read",
        [](Pool &pool, Array<const uint8_t> data) {
            nb::gil_scoped_release nogil;
            return em_stream_read(pool.p, data.data(), data.size());
        },
        "pool"_a, "data"_a.noconvert());

    m.def(
        "int8_peak",
        [](Pool &pool, double seconds) {
            nb::gil_scoped_release nogil;
            return em_int8_peak(pool.p, seconds);
        },
        "pool"_a, "seconds"_a);

    m.def(
        "quantize_rows",
        [](Pool &pool, ConstF32 w, int group, Array<const int32_t> levels, Array<uint8_t> codes,
           Array<uint8_t> exponent, Array<uint8_t> step, Array<uint8_t> zero, Array<uint8_t> shift) {
            nb::gil_scoped_release nogil;
            const int status =
                em_quantize_rows(pool.p, w.data(), dim(w, 0), dim(w, 1), group, levels.data(), dim(levels, 0),
                                 codes.data(), exponent.data(), step.data(), zero.data(), shift.data());
            check(status);
            return status == EM_OK;
        },
        "pool"_a, "w"_a.noconvert(), "group"_a, "levels"_a.noconvert(), "codes"_a.noconvert(),
        "exponent"_a.noconvert(), "step"_a.noconvert(), "zero"_a.noconvert(), "shift"_a.noconvert());

    m.def(
        "nest_rows",
        [](Pool &pool, ConstF32 w, Array<const int32_t> starts, Array<const int32_t> bits, ConstF32 feedback,
           ConstF32 moment, ConstF32 s, ConstF32 o, ConstF32 weight, int reach, int sweeps,
           Array<uint8_t> codes) {
            nb::gil_scoped_release nogil;
            check(em_nest_rows(pool.p, w.data(), dim(w, 0), dim(w, 1), starts.data(), dim(starts, 0) - 1,
                               bits.data(), feedback.data(), moment.data(), s.data(), o.data(), weight.data(),
                               dim(weight, 0), reach, sweeps, codes.data()));
        },
        "pool"_a, "w"_a.noconvert(), "starts"_a.noconvert(), "bits"_a.noconvert(), "feedback"_a.noconvert(),
        "moment"_a.noconvert(), "s"_a.noconvert(), "o"_a.noconvert(), "weight"_a.noconvert(), "reach"_a,
        "sweeps"_a, "codes"_a.noconvert());

    m.def(
        "pack_rows",
        [](Pool &pool, Array<const uint8_t> codes, Array<const int32_t> levels,
           const std::vector<Array<uint8_t>> &planes) {
            std::vector<uint8_t *> out;
            out.reserve(planes.size());
            for (const auto &a : planes) out.push_back(a.data());
            nb::gil_scoped_release nogil;
            em_pack_rows(pool.p, codes.data(), dim(codes, 0), dim(codes, 1), levels.data(), dim(levels, 0),
                         out.data());
        },
        "pool"_a, "codes"_a.noconvert(), "levels"_a.noconvert(), "planes"_a.noconvert());

    m.def("ggml_blocks", [] {
        nb::dict blocks;
        for (int i = 0; i < em_ggml_count(); i++) {
            const em_ggml_type *type = em_ggml_at(i);
            blocks[type->name] = nb::make_tuple(type->weights, type->bytes);
        }
        return blocks;
    });

    m.def(
        "dequantize",
        [](Pool &pool, Array<const uint8_t> data, const std::string &type_name, F32 out) {
            const em_ggml_type *type = em_ggml_find(type_name.c_str());
            if (!type) throw nb::key_error(type_name.c_str());
            nb::gil_scoped_release nogil;
            em_dequantize(pool.p, type, data.data(), data.size() / static_cast<size_t>(type->bytes),
                          out.data());
        },
        "pool"_a, "data"_a.noconvert(), "type_name"_a, "out"_a.noconvert());

    m.def("linear_scratch", &em_linear_scratch, "n"_a, "cols"_a, "group_units"_a);
    m.def("experts_scratch", &em_experts_scratch, "threads"_a, "n"_a, "pairs"_a, "hidden"_a, "intermediate"_a,
          "ahead"_a, "group_units"_a);
    m.def("mixture_scratch", &em_mixture_scratch, "threads"_a, "n"_a, "k"_a, "jobs"_a, "hidden"_a,
          "intermediate"_a, "ahead"_a, "group_units"_a, "whole"_a);
    m.def("layer_scratch", &em_layer_scratch, "threads"_a, "n"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "d"_a,
          "mlp"_a, "experts"_a, "group_units"_a);
    m.def("attention_scratch", &em_attention_scratch, "threads"_a, "n"_a, "heads"_a, "kv_heads"_a, "d"_a);
}
