// Phase 2 of prefill: common/normaliser_scan.cuh.
#include "common/instantiate.h"
#include "common/normaliser_scan.cuh"

INFINI_KERNEL(infini_normaliser_scan_sm80, normaliser_scan, InfiniNormaliserScan,
              infini::kElementThreads, 1)
