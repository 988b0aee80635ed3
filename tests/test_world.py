"""The demo world: exact masks, seeds, motion, and the split of the photos."""

import dataclasses

import numpy as np
import pytest

from kvlock_jax.demo import world

SEEDS = range(40)


def _inside(shape, radius, x, y):
    """Plain membership of the point (x, y), relative to the centre, y downwards."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return (abs(x) <= 0.9 * radius) & (abs(y) <= 0.9 * radius)
    if shape == "triangle":  # half-width grows from 0 at the apex to r at the base
        return (y <= radius) & (y >= -radius) & (abs(x) <= (y + radius) / 2)
    narrow, wide = 0.3 * radius, radius
    return ((abs(x) <= narrow) & (abs(y) <= wide)) | ((abs(x) <= wide) & (abs(y) <= narrow))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_cover_is_the_share_of_subpixels_inside(shape):
    centre, radius, fine = (45.3, 50.8), 20.6, 16
    at = (np.arange(world.SIZE * fine) + 0.5) / fine - 0.5
    inside = _inside(shape, radius, at[None] - centre[0], at[:, None] - centre[1])
    share = inside.reshape(world.SIZE, fine, world.SIZE, fine).mean((1, 3))
    cover = world.shape_cover(shape, radius, centre)
    assert cover.dtype == np.float32
    # The distance's cover is exact on upright edges and some hundredths off on slanted ones.
    assert np.abs(cover - share).mean() < 1e-3
    assert np.quantile(np.abs(cover - share), 0.999) < 0.25
    assert abs(cover.sum() - share.sum()) < 0.01 * share.sum()
    assert ((cover > 0.99) <= (share > 0.9)).all() and ((share > 0.99) <= (cover > 0.9)).all()


def test_shapes_by_hand():
    radius, centre = 20.0, (48.0, 48.0)
    areas = {s: world.shape_cover(s, radius, centre).sum() for s in world.SHAPES}
    assert areas["circle"] == pytest.approx(np.pi * 400, rel=0.01)
    assert areas["square"] == pytest.approx(36**2, rel=0.01)
    assert areas["triangle"] == pytest.approx(40 * 40 / 2, rel=0.01)
    assert areas["plus"] == pytest.approx(2 * 40 * 12 - 12**2, rel=0.01)
    triangle = world.shape_cover("triangle", radius, centre)
    assert triangle[30].sum() < 3 and triangle[66].sum() > 36  # the apex is at the top


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="star"):
        world.shape_cover("star", 20.0, (48.0, 48.0))


@pytest.mark.parametrize("held_out", [False, True])
def test_clip_is_the_background_outside_the_mask_and_the_colour_inside(held_out):
    for seed in SEEDS:
        scene = world.random_scene(seed, held_out=held_out)
        clip, background = world.render(scene), world.render_background(scene)
        assert clip.video.shape == (world.FRAMES, world.SIZE, world.SIZE, 3)
        assert clip.video.dtype == np.uint8 and clip.mask.dtype == bool
        np.testing.assert_array_equal(clip.video[~clip.mask], background[~clip.mask])
        for frame, mask, (x, y) in zip(clip.video, clip.mask, scene.centres, strict=True):
            assert tuple(frame[round(y), round(x)]) == world.COLOURS[scene.colour]
            # No pixel of the frame's border is touched: the object lies wholly inside.
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        # Every pixel of the mask was touched, but for covers that round to no change.
        unchanged = (clip.video == background).all(-1) & clip.mask
        assert unchanged.sum() < 0.02 * clip.mask.sum()


def test_object_moves_by_its_velocity():
    # Whole pixels and a background that stands still: each mask is the last one, shifted.
    scene = dataclasses.replace(
        world.random_scene(0), start=(36.0, 60.0), velocity=(2.0, -1.0), pan=(0.0, 0.0)
    )
    clip, background = world.render(scene), world.render_background(scene)
    assert (background == background[0]).all()
    for before, after in zip(clip.mask[:-1], clip.mask[1:], strict=True):
        np.testing.assert_array_equal(after, np.roll(before, (-1, 2), axis=(0, 1)))


def test_background_pans_over_the_photo():
    scene = dataclasses.replace(world.random_scene(0), photo="coffee", origin=(20.0, 30.0))
    still = world.render_background(dataclasses.replace(scene, pan=(0.0, 0.0)))[0]
    panned = world.render_background(dataclasses.replace(scene, pan=(8.0, -8.0)))
    # One pixel a frame to the right and up: the pixel of (x + t, y - t) is now at (x, y).
    for t, frame in enumerate(panned):
        np.testing.assert_array_equal(
            frame[t:, : world.SIZE - t], still[: world.SIZE - t, t:], err_msg=f"frame {t}"
        )


def test_background_between_pixels_is_their_mean():
    scene = dataclasses.replace(world.random_scene(0), photo="coffee", pan=(0.0, 0.0))
    corners = [(20.0, 30.0), (21.0, 30.0), (20.0, 31.0), (21.0, 31.0)]
    crops = [
        world.render_background(dataclasses.replace(scene, origin=c))[0].astype(float)
        for c in corners
    ]
    between = world.render_background(dataclasses.replace(scene, origin=(20.5, 30.25)))[0]
    expected = 0.375 * (crops[0] + crops[1]) + 0.125 * (crops[2] + crops[3])
    assert np.abs(between - expected).max() <= 1  # both were rounded to whole levels


def test_mirrored_photo_seen_from_the_other_side():
    scene = dataclasses.replace(
        world.random_scene(0), photo="coffee", origin=(72.0, 10.0), pan=(0.0, 0.0), mirrored=False
    )
    # The photo is 240 px wide: the middle 96 of them start at 72 from either side.
    plain = world.render_background(scene)
    mirrored = world.render_background(dataclasses.replace(scene, mirrored=True))
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
    assert (mirrored != plain).any()


def test_a_seed_is_a_clip():
    one, two = (world.render(world.random_scene(7)) for _ in range(2))
    np.testing.assert_array_equal(one.video, two.video)
    assert world.random_scene(7) == world.random_scene(7)
    assert len({world.random_scene(seed) for seed in SEEDS}) == len(SEEDS)


def test_edits_keep_the_background_and_say_what_they_are():
    scene = world.random_scene(3)
    other = dataclasses.replace(scene, shape="plus", colour="white")
    source, edit = world.render(scene), world.render(other)
    outside = ~(source.mask | edit.mask)
    np.testing.assert_array_equal(source.video[outside], edit.video[outside])
    assert edit.caption == world.caption("plus", "white") == "a white plus"


def test_splits_and_scenes_stay_in_their_ranges():
    assert not set(world.TRAIN_PHOTOS) & set(world.HELD_OUT_PHOTOS)
    for held_out, photos in [(False, world.TRAIN_PHOTOS), (True, world.HELD_OUT_PHOTOS)]:
        scenes = [world.random_scene(seed, held_out=held_out) for seed in range(400)]
        assert {s.photo for s in scenes} == set(photos)
        combinations = {(s.shape, s.colour) for s in scenes}
        assert len(combinations) == len(world.SHAPES) * len(world.COLOURS)
        assert all(36 <= 2 * s.radius <= 48 for s in scenes)
        assert max(np.hypot(*s.velocity) for s in scenes) <= 2
        assert max(np.abs(s.pan).max() for s in scenes) <= 8


def test_every_photo_stays_clear_of_the_colours():
    # In every crop each pixel is nearer to a mid-grey than to any colour, by a wide margin.
    colours = np.array(list(world.COLOURS.values()), float)
    for photo in world.TRAIN_PHOTOS + world.HELD_OUT_PHOTOS:
        scene = dataclasses.replace(world.random_scene(0), photo=photo, pan=(0.0, 0.0))
        for origin in [(0.0, 0.0), (64.0, 64.0), (0.0, 64.0), (64.0, 0.0)]:
            pixels = world.render_background(dataclasses.replace(scene, origin=origin))[0]
            pixels = pixels.reshape(-1, 3).astype(float)
            assert 45 <= pixels.min() and pixels.max() <= 186
            to_colours = np.linalg.norm(pixels[:, None] - colours, axis=-1).min()
            to_grey = np.linalg.norm(pixels - pixels.mean(-1, keepdims=True), axis=-1).max()
            assert to_colours > 100 > 2 * to_grey
            assert pixels.std() > 3  # something is to be seen


def test_longer_clips_begin_as_short_ones_and_bounce():
    for seed in SEEDS:
        short, long = world.random_scene(seed), world.random_scene(seed, frames=65)
        assert dataclasses.replace(long, frames=world.FRAMES) == short
        np.testing.assert_array_equal(long.centres[:9], short.centres)
        steps = np.diff(long.centres, axis=0)
        assert (np.abs(steps) <= np.abs(long.velocity) + 1e-9).all()
        low, high = long.radius, world.SIZE - 1 - long.radius
        assert (low <= long.centres).all() and (long.centres <= high).all()
    clip = world.render(dataclasses.replace(long, frames=12))
    assert clip.video.shape == (12, 96, 96, 3) and clip.mask.shape == (12, 96, 96)
    edges = [clip.mask[:, 0], clip.mask[:, -1], clip.mask[:, :, 0], clip.mask[:, :, -1]]
    assert not np.any(edges)


def test_pairs_have_two_objects_in_the_order_of_their_caption():
    firsts = set()
    for seed in SEEDS:
        scene = world.random_pair(seed)
        other = scene.other
        assert other is not None and scene.colour != other.colour
        clip, frames = world.render(scene), world.FRAMES
        for thing in (scene, other):
            low = thing.radius + 1
            centres = world.centres_of(thing, frames)
            assert (centres >= low - 1e-6).all() and (centres <= world.SIZE - 1 - low + 1e-6).all()
            colour = (clip.video == np.array(world.COLOURS[thing.colour])).all(-1)
            assert colour.sum((1, 2)).min() > 50
        left = min((scene, other), key=lambda thing: world.centres_of(thing, frames)[4, 0])
        assert clip.caption.startswith(f"a {left.colour} {left.shape} and a ")
        firsts.add(left is scene)
        alone = world.render(dataclasses.replace(scene, other=None))
        assert (alone.mask == clip.mask).all()
    assert firsts == {True, False}


def test_a_post_stands_still_in_front():
    for seed in SEEDS:
        scene = world.with_post(world.random_scene(seed), seed)
        left, right = scene.post
        cover = world.post_cover(scene)
        assert 6 <= right - left <= 10 and cover.sum() == pytest.approx(right - left, abs=1e-3)
        clip, background = world.render(scene).video, world.render_background(scene)
        post = cover == 1
        assert (clip[:, :, post] == clip[0, 0, post][0]).all()
        assert (background[:, :, post] == clip[:, :, post]).all()
        plain = world.render(dataclasses.replace(scene, post=None)).video
        assert (plain[:, :, cover == 0] == clip[:, :, cover == 0]).all()
        x = scene.centres[:, 0]
        assert x.min() - 10 <= (left + right) / 2 <= x.max() + 10
