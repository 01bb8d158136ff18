"""Put layers into a model that already exists: after a module, or instead of one.

Models are changed in place, and any `nn.Module` will do. The modules to change are named by a pattern over their names,
by a type, or by several of these:

- `"resnet.encoder.stages.*.layers.*.layer"`: `*` stands for one name or a part of it, `**` for any number of names;
- `nn.ReLU`: every module of this type or of one derived from it.

>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
>>> print(swap(model, nn.ReLU, lambda relu: nn.PReLU()))
1: ReLU becomes PReLU, +1 parameters
1 change, +1 parameters
>>> print(insert_after(model, nn.Conv2d, nn.BatchNorm2d, name="norm"))
0: BatchNorm2d follows Conv2d, 8 wide, as .norm, +16 parameters
2: BatchNorm2d follows Conv2d, 4 wide, as .norm, +8 parameters
2 changes, +24 parameters
"""

from provenn.surgery.changes import Change, Changes
from provenn.surgery.inserting import insert_after
from provenn.surgery.swapping import remove, swap

__all__ = ["Change", "Changes", "insert_after", "remove", "swap"]
