// Pieces of a chain, as the scans walk them.
#pragma once

#include "common/element.cuh"
#include "params.h"

namespace infini {

// How many of a chain's pieces complete a segment: all but perhaps the last, for those before it end
// where the next begins. (Only the first can find no memory, and the chain says whether it does.)
__device__ __forceinline__ int full_pieces(const InfiniRun& run, const InfiniChain& chain) {
  if (chain.pieces == 0) return 0;
  const int last = chain.first_piece + chain.pieces - 1;
  return chain.pieces - (pointer<const InfiniPiece>(run.pieces)[last].full ? 0 : 1);
}

}  // namespace infini
