// Phase 2 of prefill on Hopper: the portable code, in a launch that may begin early.
#include "common/normaliser_scan.cuh"
#include "sm90/instantiate.h"

INFINI_SM90_PLAIN(infini_normaliser_scan_sm90, normaliser_scan, InfiniNormaliserScan,
                  infini::kElementThreads, 1)
