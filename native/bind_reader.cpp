// The Python binding of the read queue. It keeps every array that a read may still write to.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "reader.h"

namespace nb = nanobind;
using namespace nb::literals;

template <class T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

namespace {

// How long a wait may be deaf to signals.
constexpr double SLICE_S = 0.1;

// Columns of the table of reads.
enum { OFFSET, SIZE, CRC32C, AT, ROOM, TAG, COLUMNS };

// What submit answers beside the codes of em_reader_submit.
enum { OUTSIDE = -1 };

struct Reader {
    em_reader *r = nullptr;
    std::unordered_map<uint64_t, Array<uint8_t>> memory; // by tag; guarded by the GIL

    Reader(int fd, const std::string &engine, int depth, int capacity, bool direct, size_t chunk,
           double bytes_per_second) {
        const int which = engine == "uring"     ? EM_ENGINE_URING
                          : engine == "threads" ? EM_ENGINE_THREADS
                                                : EM_ENGINE_BEST;
        const em_reader_options options = {which, depth, capacity, direct, chunk, bytes_per_second};
        errno = em_reader_new(fd, &options, &r);
        if (errno) {
            PyErr_SetFromErrno(PyExc_OSError);
            throw nb::python_error();
        }
    }
    Reader(const Reader &) = delete;
    Reader &operator=(const Reader &) = delete;
    ~Reader() {
        nb::gil_scoped_release nogil;
        em_reader_free(r); // only then is the memory let go
    }

    int submit(Array<uint8_t> out, Array<const uint64_t> table, int64_t priority) {
        std::vector<em_read> reads(table.shape(0));
        const uint64_t *row = table.data();
        const uint64_t bytes = out.size();
        for (em_read &read : reads) {
            if (row[ROOM] > bytes || row[AT] > bytes - row[ROOM]) return OUTSIDE;
            read = {row[OFFSET],          row[SIZE], row[ROOM],
                    out.data() + row[AT], row[TAG],  static_cast<uint32_t>(row[CRC32C])};
            row += COLUMNS;
        }
        // With the GIL: nobody can collect a read before its memory is held.
        const int status = em_reader_submit(r, reads.data(), reads.size(), priority);
        if (status == EM_READER_OK)
            for (const em_read &read : reads) memory.insert_or_assign(read.tag, out);
        return status;
    }

    nb::tuple cancel(uint64_t tag) {
        int waited = 0;
        const int status = em_reader_cancel(r, tag, &waited);
        if (waited) memory.erase(tag);
        return nb::make_tuple(status, waited != 0);
    }

    int cancel_all() {
        std::vector<uint64_t> tags(memory.size());
        size_t n = 0;
        const int status = em_reader_cancel_all(r, tags.data(), tags.size(), &n);
        for (size_t i = 0; i < n; i++) memory.erase(tags[i]);
        return status;
    }

    nb::tuple reprioritise(uint64_t tag, int64_t priority) {
        int waited = 0;
        const int status = em_reader_reprioritise(r, tag, priority, &waited);
        return nb::make_tuple(status, waited != 0);
    }

    nb::tuple wait(std::optional<uint64_t> tag, double seconds) {
        em_read_done done{};
        int status;
        for (;;) {
            const double slice = std::min(seconds, SLICE_S);
            {
                nb::gil_scoped_release nogil;
                status = em_reader_wait(r, tag ? &*tag : nullptr, slice, &done);
            }
            seconds -= slice;
            if (status == EM_READER_OK) memory.erase(done.tag);
            if (status != EM_READER_TIMEOUT || seconds <= 0) break;
            if (PyErr_CheckSignals()) throw nb::python_error();
        }
        return nb::make_tuple(status, done.tag, done.status, done.error, done.at, done.begun_ns,
                              done.ended_ns);
    }

    nb::dict stats() {
        em_reader_stats s;
        em_reader_get_stats(r, &s);
        nb::dict out;
        out["bytes_read"] = s.bytes_read;
        out["reads"] = s.reads;
        out["retries"] = s.retries;
        out["bytes_copied"] = s.bytes_copied;
        out["bytes_verified"] = s.bytes_verified;
        out["busy_s"] = s.busy_s;
        out["waited_s"] = s.waited_s;
        out["verify_s"] = s.verify_s;
        out["oldest_s"] = s.oldest_s;
        out["memory_bytes"] = s.memory_bytes;
        out["in_flight"] = s.in_flight;
        out["waiting"] = s.waiting;
        out["direct"] = s.direct != 0;
        out["engine"] = s.engine;
        return out;
    }

    void close() {
        {
            nb::gil_scoped_release nogil;
            em_reader_close(r);
        }
        memory.clear();
    }
};

} // namespace

void bind_reader(nb::module_ &m) {
    nb::class_<Reader>(m, "Reader")
        .def(nb::init<int, const std::string &, int, int, bool, size_t, double>(), "fd"_a, "engine"_a,
             "depth"_a, "capacity"_a, "direct"_a, "chunk"_a, "bytes_per_second"_a)
        .def("submit", &Reader::submit, "memory"_a.noconvert(), "reads"_a.noconvert(), "priority"_a)
        .def("cancel", &Reader::cancel, "tag"_a)
        .def("cancel_all", &Reader::cancel_all)
        .def("reprioritise", &Reader::reprioritise, "tag"_a, "priority"_a)
        .def("wait", &Reader::wait, "tag"_a.none(), "seconds"_a)
        .def("stats", &Reader::stats)
        .def("close", &Reader::close);
}
