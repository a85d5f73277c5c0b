// What the files of the Python binding share.
#ifndef EDGEMOE_BIND_H
#define EDGEMOE_BIND_H

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <new>

#include "edgemoe.h"

namespace nb = nanobind;
using namespace nb::literals;

template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using F32 = Array<float>;
using ConstF32 = Array<const float>;

struct Pool {
    em_pool *p;
    explicit Pool(int threads) : p(em_pool_new(threads)) {
        if (!p) throw std::bad_alloc();
    }
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;
    ~Pool() {
        nb::gil_scoped_release nogil;
        em_pool_free(p);
    }
};

inline void check(int status) {
    if (status == EM_NO_MEMORY) throw std::bad_alloc();
}

int dim(const auto &array, size_t axis) { return static_cast<int>(array.shape(axis)); }

void bind_reader(nb::module_ &m);
void bind_layer(nb::module_ &m);

#endif
