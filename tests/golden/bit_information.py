"""Write bit_information.json: what xbitinfo says of a few fields. Run it with xbitinfo 0.0.7 installed."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path

FIELDS = '''
import numpy as np


def field(name):
    """A few fields, of generators whose numbers NumPy keeps from version to version."""
    bits = np.random.Generator(np.random.PCG64(7))
    noise = (bits.integers(-1000, 1001, (60, 90)) / 1000).cumsum(0).cumsum(1)
    return {"temperature": 280 + noise / 40, "near one": 1 + noise / 500, "signs": noise / 3}[name]
'''


def main():
    import xarray as xr
    import xbitinfo as xb

    scope = {}
    exec(FIELDS, scope)
    cases = []
    for name in ("temperature", "near one", "signs"):
        for dtype in ("float32", "float64"):
            for axis in (0, 1):
                ds = xr.Dataset({"x": (("a", "b"), scope["field"](name).astype(dtype))})
                found = xb.get_bitinformation(ds, dim="ab"[axis], implementation="python")
                keepbits = xb.get_keepbits(found, 0.99)
                cases.append(
                    {
                        "field": name,
                        "dtype": dtype,
                        "axis": axis,
                        "information": found.x.values.tolist(),
                        "keepbits": int(keepbits.x.values.item()),
                    }
                )
    written = {"xbitinfo": version("xbitinfo"), "numpy": version("numpy"), "fields": FIELDS, "cases": cases}
    Path(__file__).with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
