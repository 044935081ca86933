// SPDX-License-Identifier: Apache-2.0
// What Python and C++ both state. tests/kernels/steering/test_constants.py
// reads this file and the Python side, and compares them name by name.
#pragma once

namespace vllm_steering {

// layers/steering_state.py: MetaField, columns of SAEWeights.meta.
enum Meta { kDSae = 0, kUsesTopk = 1, kK = 2, kTopkRelu = 3, kSkipMask = 4 };

// layers/steering_state.py: ClampKind, ONLY_IF_ACTIVE and ClampFlag.
enum ClampCode {
  kAbsolute = 0,
  kAdditive = 1,
  kScale = 2,
  kCondition = 3,
  kOnlyIfActive = 4,
  kProjection = 8,
  kRelative = 16,
  kIfBelow = 32,
  kIfAbove = 64
};

// layers/steering_state.py: KIND_BITS and CONDITION_SHIFT.
constexpr int kKindBits = 3;
constexpr int kConditionShift = 8;

// layers/steering_state.py: exponents of two of STREAM_LIMIT, by the model's
// dtype, and of COEFFICIENT_LIMIT.
constexpr int kStreamLimitBfloat16 = 56;
constexpr int kStreamLimitFloat16 = 15;
constexpr int kCoefficientLimit = 96;

// steering_kernels/plan.py: RECORD_INTS, LIST_MAX, COMPACT_ENCODE_TOKENS,
// DENSE_SPLITS.
constexpr int kRecordInts = 32;
constexpr int kListMax =
    512;  // non-zeros of a token that is decoded from a list
constexpr int kCompactEncodeTokens = 256;
constexpr int kDenseSplits = 7;

// steering_kernels/plan.py: GUESS_SAMPLE, GUESS_CAPACITY.
constexpr int kGuessSample = 4096;    // features whose scores are sampled
constexpr int kGuessCapacity = 1024;  // candidates that a list has room for

// steering_kernels/screen.py: SCREEN_TOKENS. config/steering_screening.py:
// SCREEN_COLUMNS, FINE_COLUMNS.
constexpr int kScreenTokens = 64;
constexpr int kScreenColumns = 128;
constexpr int kFineColumns = 256;

// layers/steering_state.py: SYNC_INTS.
constexpr int kSyncInts = 8;

// layers/steering_read_state.py: columns of a reading table's row; its
// features begin at TABLE_HEAD. config/steering.py: MAX_READ_VALUES.
enum ReadColumn { kReadActive = 0, kReadTopK = 2, kReadCount = 3 };
constexpr int kTableHead = 4;
constexpr int kMaxRead = 512;

// steering_kernels/bundles.py: the order of the tensors in an op's bundles.
enum WeightsField {
  kWEnc = 0,
  kBEnc = 1,
  kThreshold = 2,
  kWDec = 3,
  kBDec = 4,
  kMeta = 5,
  kNormLimit = 6,
  kShared = 7,
};
enum WorkspaceField {
  kX = 0,
  kRecords = 1,
  kCount = 2,
  kSync = 3,
  kEntries = 4,
  kScores = 5,
  kKth = 6,
  kCoef = 7,
  kDense = 8,
  kSkip = 9,
};
enum StepField {
  kIndex = 0,
  kFlags = 1,
  kTable = 2,
  kSaturated = 3,
  kReadIndex = 4,
  kReadTable = 5,
  kReadScale = 6,
  kReadOut = 7
};
enum ScreenField {
  kScreenW = 0,
  kScreenRows = 1,
  kScreenState = 2,
  kScreenFine = 3,
  kScreenLimbs = 4,
  kScreenFacts = 5,
  kScreenCandidates = 6,
  kScreenCounts = 7,
  kScreenSums = 8
};
enum StreamField { kHidden = 0, kResidual = 1 };
enum GuessField { kSamples = 0, kBars = 1, kFailed = 2 };

// steering_kernels/peers.py: the numbers of an exchange; the addresses of all
// ranks' arenas follow.
enum ShareField {
  kShareRank = 0,
  kShareSize = 1,
  kShareRows = 2,
  kShareLists = 3,
  kShareFlags = 4,
  kShareColumns = 5,
  kShareStaging = 6,
  kShareStagingBytes = 7,
  kSharePacketRows = 8,
  kSharePackets = 9,
  kShareColumnPackets = 10,
  kShareAddresses = 11,
};
// steering_kernels/peers.py: where the clamps' regions of an arena are.
enum ClampShareField {
  kClampRows = 0,
  kClampEach = 1,
  kClampSlices = 2,
  kClampRounds = 3,
  kClampHeads = 4,
  kClampActs = 5,
  kClampFlags = 6,
  kClampFields = 7,
};

}  // namespace vllm_steering
