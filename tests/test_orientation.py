"""All eight orientations, of videos by display matrix and of pictures by EXIF."""

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from clips import psnr, quadrants

from kvlock_jax.media import decode

UNIT = 1 << 16
MATRICES = {  # entries a, b, c, d, and the same by NumPy
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda image: image.swapaxes(0, 1),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).swapaxes(0, 1),
}


@pytest.mark.parametrize("entries", MATRICES)
def test_a_videos_display_matrix_is_applied(tmp_path, entries):
    a, b, c, d = (UNIT * entry for entry in entries)
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        output.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), format="rgb24")))
        output.mux(stream.encode(None))
    expected = MATRICES[entries](quadrants())
    found = decode.read_video(tmp_path / "a.mp4").frames[0]
    assert found.shape == expected.shape
    assert psnr(found, expected) > 25


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_a_pictures_exif_is_applied(tmp_path, orientation, suffix):
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    options = {} if suffix == ".tiff" else {"quality": 95}
    path = tmp_path / f"a{suffix}"
    PIL.Image.fromarray(quadrants()).save(path, exif=exif, **options)
    turned = {
        1: lambda image: image,
        2: np.fliplr,
        3: lambda image: np.rot90(image, 2),
        4: np.flipud,
        5: lambda image: image.swapaxes(0, 1),
        6: lambda image: np.rot90(image, -1),
        7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
        8: np.rot90,
    }[orientation](quadrants())
    found = decode.read_image(path)
    assert found.shape == turned.shape
    assert psnr(found, turned) > 25
