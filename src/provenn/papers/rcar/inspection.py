"""Where the words of a caption look, attention by attention, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.rcar.encoders import PictureEncoder
from provenn.papers.rcar.hosts import Step
from provenn.papers.rcar.model import Ensemble, Matching
