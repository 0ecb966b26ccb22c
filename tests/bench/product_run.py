"""Our side of the benchmarks that are no `ad train`: python -m bench.product_run ORDER

As anomalib_run: ORDER and the last printed line are JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def coreset(order: dict) -> dict:
    """Choose `size` of the stored features, from the given start."""
    import torch

    from anomaly_detection.coreset import greedy_coreset

    features = torch.from_numpy(np.load(Path(order["folder"], "features.npy")))
    started = time.perf_counter()
    chosen = greedy_coreset(features, order["size"], order["start"], progress=False)
    return {"seconds": time.perf_counter() - started, "chosen": chosen.tolist()}


def metrics(order: dict) -> dict:
    """All image and pixel metrics of stored maps and masks."""
    from anomaly_detection.metrics import image_metrics, pixel_metrics

    maps = np.load(Path(order["folder"], "maps.npy"))
    masks = np.load(Path(order["folder"], "masks.npy"))
    started = time.perf_counter()
    found = image_metrics(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)))
    found |= pixel_metrics(maps, masks)
    return {"seconds": time.perf_counter() - started, "metrics": found}


def main() -> None:
    order = json.loads(sys.argv[1])
    print(json.dumps({"coreset": coreset, "metrics": metrics}[order["what"]](order)))


if __name__ == "__main__":
    main()
