"""How fast are a model's matrix products here, by type? What `fast_dtype` decides on.

    python benchmarks/type_speed.py [--threads 2]

One row of 512 tokens through the shapes of SmolLM2-135M's layers, in float32, in bfloat16 and as
integers (`torch._int_mm`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from recording import append_rows

TOKENS = 512
SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576)]  # inputs, outputs


def rate(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> float:
    """Return operations per second, the median of seven passes through the shapes."""
    # integers of 8 bits, which every type holds
    factors = [
        [torch.randint(-127, 128, (n, k), dtype=torch.int8).to(dtype) for n in (TOKENS, m)]
        for k, m in SHAPES
    ]
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        for x, w in factors:
            product(x, w.t())
        seconds.append(time.perf_counter() - start)
    return sum(2 * TOKENS * k * m for k, m in SHAPES) / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        found = rate(torch._int_mm if dtype is torch.int8 else torch.mm, dtype)
        row = {"type": str(dtype).removeprefix("torch."), "gflops": round(found / 1e9, 1)}
        row |= {
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
        print(row)
        rows.append(row)
    append_rows("type_speed", rows)


if __name__ == "__main__":
    main()
