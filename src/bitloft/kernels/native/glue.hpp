// What lies between the products of a decoder layer, for one row: norm, rotary positions, attention, the gate.
//
// Widths are multiples of 16. Everything is float32 and serial; decoder.cpp shares rows and heads out among threads.
#pragma once

#include <cstdint>

namespace bl {

constexpr int64_t SLOTS = 64;  // a cache's capacity is a multiple of this many positions

// Attention of the query heads that share one key and value head, for one row.
struct Attention {
  int64_t group, width;      // query heads; values of a head
  int64_t position;          // of the row's newest token: it sees 0 .. position
  int64_t capacity;          // slots of the cache
  float scale;
  const float *cos, *sin;    // [width], of this position
  float* queries;            // [group, width]; turned in place, then overwritten by the result
  float* key;                // [width]; turned in place
  const float* value;        // [width]
  float *keys, *values;      // the cache: [width, capacity] and [capacity, width]; the new token is written to it
  float* scores;             // room for [capacity]
};

}  // namespace bl
