#!/usr/bin/env bash
# constriction: an encode call that raises has already put part of its message on the coder.
#
# Expected: a call that fails leaves its coder as it was, so that one can catch the KeyError of a symbol outside the
#   support, code that message in another way, and go on.
# Seen: symbols are coded one after the other until one has no probability. Those before it stay: on an AnsCoder,
#   which is a stack, whatever is decoded next is the rest of the failed message, and all that was coded earlier lies
#   below it. On a RangeEncoder they stand in the middle of the stream.
# Matters: codecs with bits back (Bit-Swap, and the variational bound of a diffusion model as a file) meet rare
#   latents outside their window. "try, except KeyError, escape" writes files that cannot be decoded.
# Instead: look whether all symbols lie in the support before you encode, or keep a copy: coder.clone() before, and
#   go on with that one after an error.
# Versions: constriction 0.5.0, numpy 2.4.6.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment constriction==0.5.0 numpy==2.4.6

observe <<'PYTHON'
import constriction
import numpy as np

MODEL = constriction.stream.model.QuantizedGaussian(-10, 10, 0.0, 3.0)
GOOD, BAD = np.array([1, 2, 3], np.int32), np.array([5, 6, 11, 7, 8], np.int32)  # 11 is outside the support


def attempt(encode):
    try:
        encode(BAD, MODEL)
    except KeyError as error:
        print(f"  {BAD.tolist()}: KeyError {error}")


print("AnsCoder")
stack = constriction.stream.stack.AnsCoder()
stack.encode_reverse(GOOD, MODEL)
backup = stack.clone()
attempt(stack.encode_reverse)
after, kept = stack.decode(MODEL, 3).tolist(), backup.decode(MODEL, 3).tolist()
print(f"  {GOOD.tolist()} decodes as {after}, of the clone as {kept}")

print("RangeEncoder")
queue = constriction.stream.queue.RangeEncoder()
queue.encode(GOOD, MODEL)
attempt(queue.encode)
queue.encode(GOOD, MODEL)
decoder = constriction.stream.queue.RangeDecoder(queue.get_compressed())
print(f"  {GOOD.tolist()} twice decodes as {decoder.decode(MODEL, 6).tolist()}")
PYTHON

expect <<'SEEN'
AnsCoder
  [5, 6, 11, 7, 8]: KeyError 'Tried to encode symbol that has zero probability under the used entropy model.'
  [1, 2, 3] decodes as [7, 8, 1], of the clone as [1, 2, 3]
RangeEncoder
  [5, 6, 11, 7, 8]: KeyError 'Tried to encode symbol that has zero probability under the used entropy model.'
  [1, 2, 3] twice decodes as [1, 2, 3, 5, 6, 1]
SEEN
