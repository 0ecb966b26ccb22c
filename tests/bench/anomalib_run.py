"""Anomalib's side of a benchmark, in the second environment: python -m bench.anomalib_run ORDER

ORDER is JSON with "what": fit (model, kwargs, root, epochs, workers), coreset (folder, size) or
metrics (folder). The last line that it prints is JSON: the seconds of the measured part.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np


def fit(order: dict) -> dict:
    """Fit, and test with Anomalib's default metrics; its validation on the test images, which its
    Engine does not do without, is part of it. So many worker processes read the data.
    """
    import tempfile

    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from parity.jobs import EMBEDDED_BACKBONE
    from parity.reference_run import lightning_class, use_local_weights

    use_local_weights({EMBEDDED_BACKBONE: "embedded"}, {})
    data = MVTecAD(
        root=order["root"],
        category="bottle",
        num_workers=order["workers"],
        seed=0,
    )
    kind = lightning_class(order["model"])
    model = kind(**order["kwargs"], visualizer=False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            max_epochs=order["epochs"],
            num_sanity_val_steps=0,
            enable_progress_bar=False,
        )
        engine.fit(model, datamodule=data)
        engine.test(model, datamodule=data, verbose=False)
    return {"seconds": time.perf_counter() - started}


def coreset(order: dict) -> dict:
    """Choose `size` of the stored features."""
    import torch
    from anomalib.models.components.sampling import KCenterGreedy

    features = torch.from_numpy(np.load(Path(order["folder"], "features.npy")))
    # Features of three dimensions are taken as they are, without a projection
    sampler = KCenterGreedy(features[..., None], (order["size"] + 0.5) / len(features))
    torch.manual_seed(0)
    started = time.perf_counter()
    chosen = sampler.select_coreset_idxs()
    return {"seconds": time.perf_counter() - started, "chosen": chosen}


def metrics(order: dict) -> dict:
    """Image and pixel AUROC, AP, F1max and the AUPRO of stored maps and masks."""
    import torch
    from anomalib.data import ImageBatch
    from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max

    maps = torch.from_numpy(np.load(Path(order["folder"], "maps.npy")))
    masks = torch.from_numpy(np.load(Path(order["folder"], "masks.npy")))
    batch = ImageBatch(
        image=torch.zeros(len(maps), 3, 8, 8),
        anomaly_map=maps,
        gt_mask=masks,
        pred_score=maps.amax(dim=(1, 2)),
        gt_label=masks.flatten(1).any(1),
    )
    started = time.perf_counter()
    found = {}
    for kind in (AUROC, AUPR, F1Max, AUPRO):
        for level, fields in {
            "image": ["pred_score", "gt_label"],
            "pixel": ["anomaly_map", "gt_mask"],
        }.items():
            if kind is AUPRO and level == "image":
                continue
            metric = kind(fields=fields)
            metric.update(batch)
            found[f"{level} {kind.__name__}"] = float(metric.compute())
    return {"seconds": time.perf_counter() - started, "metrics": found}


def main() -> None:
    order = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    print(json.dumps({"fit": fit, "coreset": coreset, "metrics": metrics}[order["what"]](order)))


if __name__ == "__main__":
    main()
