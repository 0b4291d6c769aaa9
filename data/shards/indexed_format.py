"""Layout of Megatron's ``.bin/.idx`` pair (megatron/core/datasets/indexed_dataset.py).

``PREFIX.bin`` holds the tokens of all documents in order; ``PREFIX.idx``, little-endian:

| bytes | content |
|---|---|
| 9 | ``MMIDIDX`` and two zero bytes |
| 8 | version, 1 |
| 1 | code of the token dtype |
| 8, 8 | number of sequences N, number of document boundaries D |
| 4 N | tokens of each sequence, int32 |
| 8 N | byte offset of each sequence in the .bin, int64 |
| 8 D | the first sequence of each document and the number of sequences, int64 |

Moetron writes one sequence a document, so D = N + 1.
"""

import struct

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
LENGTH = np.dtype("<i4")
POINTER = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return Megatron's dtype for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


def dtype_code(dtype: np.dtype) -> int:
    """Return the code of a token dtype in the header."""
    return next(code for code, known in DTYPES.items() if known == dtype)


def index_bytes(sequences: int, boundaries: int) -> int:
    """Return the size of an index file in bytes."""
    per_sequence = LENGTH.itemsize + POINTER.itemsize
    return HEADER.size + sequences * per_sequence + boundaries * POINTER.itemsize
