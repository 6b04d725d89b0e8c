import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from itae_utils.data.images import EncodedImage, check_header, image_suffixes, open_image, shown, to_rgb
from itae_utils.errors import ItaeError
from tests.data.test_datasets import picture, save

OPAQUE = ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "LA", "PA", "RGBA", "RGBa"]
VIA_GREY = {"1", "I", "F", "LA", "I;16"}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def in_mode(mode):
    image = picture(3, size=(7, 5))
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return (image.convert("L") if mode in VIA_GREY else image).convert(mode)


class TestToRgb:
    @pytest.mark.parametrize("mode", OPAQUE)
    def test_an_opaque_image_is_converted_as_pillow_does(self, mode):
        image = in_mode(mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = to_rgb(image)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA", "P", "L", "RGB", "1"])
    def test_what_is_transparent_becomes_white(self, mode):
        """A black square on a transparent ground, whose hidden colour is black too."""
        mask = Image.new("L", (6, 6), 0)
        ImageDraw.Draw(mask).rectangle((1, 2, 3, 4), fill=255)
        if mode in ("L", "RGB", "1", "P"):  # one colour, or entry of a palette, counts as transparent
            image = Image.new(mode, mask.size, 0)
            image.paste({"RGB": (1, 1, 1), "1": 255}.get(mode, 1), mask=mask)
            if mode == "P":
                image.putpalette([0, 0, 0, 1, 1, 1])
            image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
        else:
            grey = mode.upper() in ("LA", "PA")
            image = Image.new("LA" if grey else "RGBA", mask.size, (0, 0) if grey else (0, 0, 0, 0))
            image.putalpha(mask)
            image = image.convert("RGBA").convert(mode) if mode == "PA" else image.convert(mode)
        found = np.asarray(to_rgb(image))
        inside = np.asarray(mask) > 0
        assert (found[~inside] == 255).all()
        assert (found[inside] == (255 if mode == "1" else 1 if mode in ("L", "RGB", "P") else 0)).all()

    def test_half_transparent_pixels_are_mixed_with_white(self):
        assert to_rgb(Image.new("RGBA", (1, 1), (0, 100, 200, 51))).getpixel((0, 0)) == (204, 224, 244)
        palette = Image.new("P", (2, 1))
        palette.putpalette([255, 0, 0, 0, 0, 0])
        palette.putdata([0, 1])
        palette.info["transparency"] = bytes([255, 0])
        assert [to_rgb(palette).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]

    @pytest.mark.parametrize("byte_order", ["<", ">"])
    def test_16_bit_grey_is_scaled_and_not_clipped(self, byte_order):
        values = np.array([[0, 255, 256, 32768, 65535]])
        mode = {"<": "I;16", ">": "I;16B"}[byte_order]
        image = Image.frombytes(mode, (5, 1), values.astype(f"{byte_order}u2").tobytes())
        for each in (image, Image.fromarray(values.astype(np.int32))):
            assert np.asarray(to_rgb(each))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
        image.info["transparency"] = 256
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 255, 128, 255]

    @pytest.mark.parametrize("values", [[0, 7, 255], [0, 0, 0], [3, 2, 1]])
    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_eight_bit_values_in_wide_modes_are_kept(self, values, dtype):
        found = np.asarray(to_rgb(Image.fromarray(np.array([values], dtype=dtype))))
        assert found[0].tolist() == [[value] * 3 for value in values]

    @pytest.mark.parametrize(("values", "named"), [
        (np.array([[-1, 5]], dtype=np.int32), "-1 to 5"), (np.array([[0, 65536]], dtype=np.int32), "65536"),
        (np.array([[0, 256]], dtype=np.float32), "256"), (np.array([[0, 0.5]], dtype=np.float32), "0.5"),
        (np.array([[-0.5, 3]], dtype=np.float32), "-0.5"), (np.array([[np.nan, 3]], dtype=np.float32), "nan")])
    def test_values_without_a_known_range_are_refused(self, values, named):
        with pytest.raises(ItaeError, match=rf"{named}.*mode [IF].*8 bits") as refused:
            to_rgb(Image.fromarray(values))
        assert "\n" not in str(refused.value)


class TestOpenImage:
    @pytest.mark.parametrize("suffix", [
        ".jpg", ".jfif", ".jpe", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
        ".pnm", ".tga", ".ico", ".icns", ".jp2", ".j2k", ".avif", ".pcx", ".sgi", ".qoi", ".dds", ".mpo"])
    def test_every_ending_that_pillow_reads(self, tmp_path, suffix):
        assert suffix in image_suffixes()
        image = Image.new("RGB", (32, 32), (250, 128, 5))
        try:
            image.save(tmp_path / f"x{suffix}")
        except (KeyError, OSError):
            pytest.skip(f"this Pillow does not write {suffix}")
        found = np.asarray(open_image(tmp_path / f"x{suffix}").resize((32, 32)), dtype=int)
        assert abs(found - np.asarray(image)).max() < 130  # .pgm is grey
        assert check_header(tmp_path / f"x{suffix}") in (True, False)

    @pytest.mark.parametrize("suffix", [".eps", ".ps", ".pdf", ".mpg", ".hdf", ".h5", ".wmf", ".pcd", ".txt", ""])
    def test_endings_of_no_pictures(self, suffix):
        assert suffix not in image_suffixes()

    def test_a_dark_16_bit_file_is_as_dark_as_its_neighbours(self, tmp_path):
        (tmp_path / "x.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 200, 0, 100]))
        assert np.asarray(open_image(tmp_path / "x.pgm")).max() == 0

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
    @pytest.mark.parametrize("orientation", [3, 6, 5])
    def test_an_image_is_turned_upright_by_its_exif_data(self, tmp_path, suffix, orientation):
        exif, options = Image.Exif(), {"lossless": True} if suffix == ".webp" else {}
        exif[0x0112] = orientation
        corner = Image.new("L", (32, 16), 0)
        corner.paste(255, (0, 0, 16, 16))
        corner.convert("RGB").save(tmp_path / f"x{suffix}", exif=exif, **options)
        found = np.asarray(open_image(tmp_path / f"x{suffix}"))[..., 0] > 127
        kept = np.asarray(corner) > 127
        assert (found == {3: np.rot90(kept, 2), 6: np.rot90(kept, -1), 5: kept.T}[orientation]).all()

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_broken_exif_data_does_not_matter(self, tmp_path):
        image = picture(size=(16, 8))
        image.save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 9)
        assert open_image(tmp_path / "x.png").tobytes() == image.tobytes()

    @pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "tEXt"])
    def test_long_texts_in_a_png_are_not_read(self, tmp_path, chunk):
        info, text = PngImagePlugin.PngInfo(), "x" * 2**21
        if chunk == "iTXt":
            info.add_itxt("workflow", text, zip=True)
        else:
            info.add_text("workflow", text, zip=chunk == "zTXt")
        image = picture()
        image.save(tmp_path / "x.png", pnginfo=info)
        check_header(tmp_path / "x.png")
        assert open_image(tmp_path / "x.png").tobytes() == image.tobytes()

    @pytest.mark.parametrize(("content", "words"), [
        (b"", "empty"),
        pytest.param(HEIC, "pillow-heif", marks=pytest.mark.skipif(".heic" in image_suffixes(), reason="HEIC is read")),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
        (b"\n<!DOCTYPE html><html>", "web page"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "format"), (b"what", "format")])
    @pytest.mark.parametrize("read", [open_image, check_header])
    def test_what_is_no_image_is_named(self, tmp_path, content, words, read):
        (tmp_path / "my photo é.png").write_bytes(content)
        encoded = EncodedImage(content)
        encoded.name = "my photo é.png"
        for source in (tmp_path / "my photo é.png", encoded):
            with pytest.raises(ItaeError, match=rf"my photo é\.png.*{words}.*on_error='skip'") as refused:
                read(source)
            assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("read", [open_image, check_header])
    def test_a_huge_image_is_not_called_damaged(self, tmp_path, monkeypatch, read):
        path = save(tmp_path / "x.png", picture(size=(20, 20)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ItaeError, match=r"x\.png.*400 pixels.*MAX_IMAGE_PIXELS") as refused:
            read(path)
        assert "repair" not in str(refused.value)

    def test_a_name_that_cannot_be_printed_is_escaped(self):
        assert shown("Zoë 字 𝄞 (1).png") == "Zoë 字 𝄞 (1).png"
        assert shown("a\nb\udce9\x1b.png") == r"a\nb\udce9\x1b.png"

    def test_a_header_tells_of_an_alpha_channel(self, tmp_path):
        assert [check_header(save(tmp_path / f"{mode}.png", picture(mode=mode))) for mode in ("RGB", "RGBA", "LA", "P")
                ] == [False, True, True, False]

    def test_the_content_of_a_file_is_read_as_the_file(self, tmp_path):
        path = save(tmp_path / "x.png")
        assert open_image(EncodedImage(path.read_bytes())) == open_image(path)
