"""What one open page works on: a clip, the marks on it, and the mask that these make."""

import dataclasses
import os

import numpy as np
from jaxtyping import Bool

from kvlock_jax.app import clips, marks, views
from kvlock_jax.app.marks import Marks
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.errors import InputError
from kvlock_jax.media.decode import Video
from kvlock_jax.media.fit import Resize
from kvlock_jax.media.masks import check_mask
from kvlock_jax.settings.schema import EditConfig
from kvlock_jax.shapes import Image, Mask


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """What is shown of a mask before anything runs.

    Attributes:
      picture: the frame with the mask's outline or its tokens.
      line: what the marks are, and how much of the clip is edited.
      problem: why the mask cannot be used, or nothing.
    """

    picture: Image
    line: str
    problem: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
    """A clip and its marks.

    Attributes:
      path: file of the clip.
      frames: number of frames that were taken from its start; 0 is all.
      video: its frames.
      marks: what is marked.
      mask: mask of the marks before it grows; `None` where there are none.
    """

    path: str
    frames: int
    video: Video
    marks: Marks = dataclasses.field(default_factory=Marks)
    mask: Mask | None = None

    @classmethod
    def opened(cls, path: str | os.PathLike, frames: int = 0) -> "Session":
        """A clip without marks; an InputError where the file is none."""
        return cls(os.fspath(path), frames, clips.read(path, frames))

    def cut(self, frames: int) -> "Session":
        """The clip of another number of frames from its start, with the marks that fit it."""
        if frames == self.frames:
            return self
        other = Session.opened(self.path, frames)
        return other.marked(self.marks.within(len(other.video.frames)))

    def number(self, shown: float | None) -> int:
        """The number of the frame that is shown for what the slider says, which may be cleared."""
        return min(max(int(shown or 0), 0), self.last)

    @property
    def last(self) -> int:
        """Number of the last frame."""
        return len(self.video.frames) - 1

    def marked(self, changed: Marks) -> "Session":
        """The clip with other marks; an InputError where they do not fit it."""
        empty = changed.whole is None and not changed.keyframes
        mask = None if empty else marks.mask_of(changed, self.video)
        return dataclasses.replace(self, marks=changed, mask=mask)

    def with_box(self, text: str, number: int) -> "Session":
        """The clip with a box `x0,y0,x1,y1` on a frame."""
        return self.marked(self.marks.put(number, marks.box_mark(text, self.video)))

    def with_paint(self, layers: list[np.ndarray], number: int) -> "Session":
        """The clip with what was painted on a frame."""
        return self.marked(self.marks.put(number, marks.painted(layers, self.video)))

    def with_file(self, path: str | os.PathLike, number: int) -> "Session":
        """The clip with a mask file: of every frame, or of this one if it is a picture."""
        return self.marked(marks.from_file(self.marks, path, number, self.video))

    def grown(self, pixels: int, inverted: bool) -> Bool[np.ndarray, "frames height width"]:
        """The mask that an edit gets.

        Raises:
          InputError: nothing is marked, or nothing is left of it.
        """
        found = self.mask if self.mask is not None else marks.mask_of(self.marks, self.video)
        mask = marks.grown(found, pixels, inverted)
        check_mask(mask)
        return mask

    def view(
        self,
        number: int,
        configs: Configs,
        edit: EditConfig,
        *,
        pixels: int = 0,
        inverted: bool = False,
        as_tokens: bool = False,
    ) -> View:
        """A frame with its mask.

        Args:
          number: of the frame.
          configs: of the model's networks.
          edit: settings with the size to work at.
          pixels: by which the mask grows.
          inverted: whether it is turned round.
          as_tokens: whether to show the tokens that are edited instead of an outline.
        """
        number = self.number(number)
        image = self.video.frames[number]
        try:
            mask = self.grown(pixels, inverted)
        except InputError as error:
            return View(views.enlarged(image), str(self.marks), str(error))
        try:
            worked = mask
            if edit.height_width:
                resize = Resize(image.shape[:2], edit.height_width, edit.fit)
                image, worked = resize.frame(image) if as_tokens else image, resize.mask(mask)
            check_mask(worked)
        except InputError as error:
            return View(views.with_outline(image, mask[number]), str(self.marks), str(error))
        tokens = views.Tokens.of(worked, configs)
        if as_tokens:
            picture = tokens.drawn(image, number)
        else:
            picture = views.with_outline(image, mask[number])
        return View(picture, f"{self.marks}. {views.coverage(worked, tokens)}")
