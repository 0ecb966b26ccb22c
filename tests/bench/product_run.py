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


def grow(order: dict) -> dict:
    """Fit on the first `count` generated caps, score 20 and compute their metrics."""
    from anomaly_detection.datasets import open_dataset
    from anomaly_detection.models import create_trainer

    data = open_dataset("mvtec", root=order["root"], category="cap")
    trainer = create_trainer(order["model"], [*order["words"], "trainer.progress=false"])
    started = time.perf_counter()
    trainer.fit(data.train[: order["count"]])
    found = trainer.predict(data.test[::2][:20]).metrics()
    return {"seconds": time.perf_counter() - started, "metrics": found["image_auroc"]}


def main() -> None:
    order = json.loads(sys.argv[1])
    kinds = {"coreset": coreset, "metrics": metrics, "grow": grow}
    print(json.dumps(kinds[order["what"]](order)))


if __name__ == "__main__":
    main()
