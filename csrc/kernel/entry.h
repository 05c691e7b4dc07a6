// What an ISA's table points at: a call goes to the tiles or, with few queries, to decoding.
#pragma once

#include "backward.h"
#include "decode.h"
#include "matrix_vector.h"
#include "peak.h"
#include "statistics.h"

namespace {

int64_t num_items(const Forward& call) {
  return decodes(call) ? call.B * call.Hkv * num_chunks(call) : num_tile_items(call);
}

int64_t scratch_bytes(const Forward& call) {
  return decodes(call) ? lay_out_decode(call, nullptr).bytes : lay_out(call, nullptr).bytes;
}

int64_t shared_bytes(const Forward& call) {
  return decodes(call) ? lay_out_chunks(call, nullptr).bytes : 0;
}

void prepare(const Forward& call, void* shared) {
  if (!decodes(call)) return;
  const Chunks chunks = lay_out_chunks(call, shared);
  for (int64_t i = 0; i < call.B * call.Hkv; ++i) chunks.done[i] = 0;
}

void begin(const Forward& call, void* scratch) {
  if (!decodes(call)) forget_slots(call, scratch);
}

void forward(const Forward& call, int64_t item, int64_t likely_next, void* scratch, void* shared) {
  if (decodes(call))
    decode(call, item, scratch, shared);
  else
    attend_item(call, item, likely_next, scratch);
}

}  // namespace
