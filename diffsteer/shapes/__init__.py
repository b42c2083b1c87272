"""The shapes world: 64 x 64 images of coloured shapes on a plain background, their captions, and a checker.

Small enough to train a diffusion model of it in minutes, and closed: what a caption says is known exactly (`parse`), images
that show it can be drawn without end (`sample_scene`, `render`), and whether an image shows it is decided without a network:

>>> import numpy as np
>>> scene = sample_scene("position", np.random.default_rng(0))
>>> check(render(scene), caption(scene)).correct
True
"""

from diffsteer.shapes.check import Verdict as Verdict
from diffsteer.shapes.check import check as check
from diffsteer.shapes.check import look as look
from diffsteer.shapes.grammar import BACKGROUNDS as BACKGROUNDS
from diffsteer.shapes.grammar import COLORS as COLORS
from diffsteer.shapes.grammar import RELATIONS as RELATIONS
from diffsteer.shapes.grammar import SHAPES as SHAPES
from diffsteer.shapes.grammar import SIZES as SIZES
from diffsteer.shapes.grammar import TASKS as TASKS
from diffsteer.shapes.grammar import UNSEEN_PAIRS as UNSEEN_PAIRS
from diffsteer.shapes.grammar import WORDS as WORDS
from diffsteer.shapes.grammar import Group as Group
from diffsteer.shapes.grammar import Statement as Statement
from diffsteer.shapes.grammar import one_attribute_changed as one_attribute_changed
from diffsteer.shapes.grammar import parse as parse
from diffsteer.shapes.grammar import task_of as task_of
from diffsteer.shapes.scene import Scene as Scene
from diffsteer.shapes.scene import Thing as Thing
from diffsteer.shapes.scene import caption as caption
from diffsteer.shapes.scene import describes as describes
from diffsteer.shapes.scene import render as render
from diffsteer.shapes.scene import sample_scene as sample_scene
from diffsteer.shapes.scene import scene_of as scene_of
