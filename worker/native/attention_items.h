// What attention goes through: items, the keys that their rows see, and where those lie.
//
// The heads that share a key head are rows of one product, and so are the queries of a chunk. A row takes its keys
// in portions, from the first on, and starts a new sum with every segment of portions; the segments' sums are then
// joined in order. So its bits depend neither on the other rows nor on the number of threads, be the segments
// of a row computed by one thread or by several.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int SEGMENT = 512;  // keys; a whole number of portions

// Queries of one row of the step that share a key head: rows of a product, the heads of a query side by side.
struct Item {
    int32_t row, kv_head, first, count;
};

struct Sums {
    float* largest;  // of the scores so far, one for each row
    float* total;    // of the weights, which are powers of score - largest
    float* values;   // the weights times the values
};

struct Places {
    const Attention& shape;
    const Step& step;

    int64_t group() const { return shape.num_heads / shape.num_kv_heads; }

    // Keys that row i of the item sees; rising.
    int64_t seen(const Item& item, int64_t i) const {
        int64_t query = (item.first + i) / group();
        int64_t num_queries = step.query_start[item.row + 1] - step.query_start[item.row];
        return step.context_len[item.row] - num_queries + query + 1;
    }

    // Keys before these are out of the window of row i; rising.
    int64_t hidden(const Item& item, int64_t i) const {
        int64_t before = shape.window ? seen(item, i) - shape.window : 0;
        return before > 0 ? before : 0;
    }

    int64_t first_segment(const Item& item) const { return hidden(item, 0) / SEGMENT; }

    int64_t segments(const Item& item) const { return (seen(item, item.count - 1) + SEGMENT - 1) / SEGMENT; }

    int64_t place(const Item& item, int64_t i) const {
        int64_t query = (item.first + i) / group(), head = item.kv_head * group() + (item.first + i) % group();
        return (step.query_start[item.row] + query) * shape.num_heads + head;
    }

    // Where in the caches the keys first .. first + count - 1 of the item lie, in elements.
    void find_slots(const Item& item, int64_t first, int64_t count, int64_t* starts) const {
        int64_t token = shape.num_kv_heads * shape.head_dim;
        const int32_t* blocks = step.table + item.row * step.table_width;
        int64_t block = first / shape.block_size, offset = first % shape.block_size;
        for (int64_t i = 0; i < count; i++) {
            starts[i] = (blocks[block] * shape.block_size + offset) * token + item.kv_head * shape.head_dim;
            if (++offset == shape.block_size) {
                offset = 0;
                block++;
            }
        }
    }
};

// All segments of an item, one after the other.
template <class Core> void attend(Core& core, const Item& item) {
    core.begin(item);
    int64_t segment = core.first_segment(item);
    core.add_segment(item, segment, core.whole);
    while (++segment < core.segments(item)) {
        core.add_segment(item, segment, core.part);
        core.join(item, core.whole, core.part);
    }
    core.write(item, core.whole);
}

// The segments of an item whose sums are there already, `size` floats apart.
template <class Core> void finish(Core& core, const Item& item, float* parts, int64_t size) {
    int64_t segment = core.first_segment(item), dim = core.shape.head_dim;
    Sums first = Core::sums_at(parts + segment * size, dim);
    while (++segment < core.segments(item)) core.join(item, first, Core::sums_at(parts + segment * size, dim));
    core.write(item, first);
}

}  // namespace
