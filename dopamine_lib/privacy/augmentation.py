"""Augmentation multiplicity: a patient's gradient is the mean over several views of the image, and clipped once.

Views of an image, mirrored, turned a little and zoomed, teach a network what does not matter. A view in each step would
do it one gradient at a time, each as noisy as before. Here a patient's A views are in the same step: what is clipped is
their mean gradient, so the patient moves the sum by C as ever, whatever A is, and no more noise is needed. The mean of
A gradients varies less than one, and says more at the same norm (De et al. 2022, section 4.2, "augmentation
multiplicity"). It costs A gradients' time, and no more memory for them: to ``bookkeeping`` the positions of a view are
further positions of its patient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: A view is turned by at most this many radians, and enlarged or reduced by at most this part.
TURN, ZOOM = math.pi / 12, 0.1


def views(images: Tensor, chance: Tensor) -> Tensor:
    """Views (B, A, C, H, W) of images (B, C, H, W), each by three numbers of ``chance`` (B, A, 3) in [0, 1).

    They say whether it is mirrored, how far it is turned and how much enlarged. What lies outside of the image is the
    nearest of its margin.

    >>> image = torch.arange(4.0).view(1, 1, 2, 2)
    >>> views(image, torch.tensor([[[0.0, 0.5, 0.5], [0.9, 0.5, 0.5]]])).flatten(2)
    tensor([[[0., 1., 2., 3.],
             [1., 0., 3., 2.]]])
    """
    count = chance.shape[1]
    mirrored, turn, zoom = chance.to(images).flatten(0, 1).T
    mirrored, turn, zoom = 1 - 2 * mirrored.round(), TURN * (2 * turn - 1), 1 + ZOOM * (2 * zoom - 1)
    cosine, sine, zero = zoom * turn.cos(), zoom * turn.sin(), torch.zeros_like(turn)
    affine = torch.stack([mirrored * cosine, -sine, zero, mirrored * sine, cosine, zero], 1).view(-1, 2, 3)
    every = images.repeat_interleave(count, 0)
    grid = F.affine_grid(affine, list(every.shape), align_corners=False)
    seen = F.grid_sample(every, grid, padding_mode="border", align_corners=False)
    return seen.view(len(images), count, *images.shape[1:])
