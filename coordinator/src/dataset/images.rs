//! A folder of image files as one float array `x`.
//!
//! Each file: decode -> shorter side to `resize` (bilinear with antialiasing, as Pillow does) -> centre `crop` ->
//! `(pixel / scale - mean) / std` -> layout. All files must end with one size.
//! Not here: augmentation, orientation tags (pixels are taken as stored).

use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, Limits};
use serde::{Deserialize, Serialize};

use super::{Array, DType, DatasetError};

/// File name endings read as images.
pub(super) const EXTENSIONS: [&str; 5] = ["png", "jpg", "jpeg", "bmp", "webp"];

/// Longest accepted side in pixels: a header may claim any.
const SIDE_MAX: u32 = 1 << 15;
/// Memory one decoded image may take.
const IMAGE_BYTES_MAX: u64 = 1 << 30;

/// Order of the dimensions of an image batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageLayout {
    /// Channels before pixels: PyTorch, ONNX.
    #[default]
    Nchw,
    /// Channels last: TensorFlow.
    Nhwc,
}

/// Channels of the array and their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channels {
    /// Red, green, blue.
    #[default]
    Rgb,
    /// Blue, green, red: Caffe, OpenCV.
    Bgr,
    /// One channel of luma.
    Gray,
}

impl Channels {
    fn count(self) -> usize {
        if self == Self::Gray { 1 } else { 3 }
    }
}

/// Preparation of images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageOptions {
    /// Scale so that the shorter side has this many pixels.
    pub resize: Option<u32>,
    /// Cut a centred square of this many pixels.
    pub crop: Option<u32>,
    /// Per channel, subtracted after scaling; one value or one per channel; none means 0.
    pub mean: Vec<f32>,
    /// Per channel, divided by last; one value or one per channel; none means 1.
    pub std: Vec<f32>,
    /// Pixels (0 to 255) are divided by this.
    pub scale: f32,
    /// Dimension order.
    pub layout: ImageLayout,
    /// Channels.
    pub channels: Channels,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            resize: None,
            crop: None,
            mean: Vec::new(),
            std: Vec::new(),
            scale: 255.0,
            layout: ImageLayout::default(),
            channels: Channels::default(),
        }
    }
}

impl ImageOptions {
    /// Checks what does not depend on any file.
    ///
    /// # Errors
    /// `ImageOption` naming the option.
    pub fn validate(&self) -> Result<(), DatasetError> {
        let refuse = |option, problem| Err(DatasetError::ImageOption { option, problem });
        for (option, side) in [("--resize", self.resize), ("--crop", self.crop)] {
            if side.is_some_and(|side| side == 0 || side > SIDE_MAX) {
                return refuse(option, format!("{} pixels, expected 1 to {SIDE_MAX}", side.unwrap_or(0)));
            }
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return refuse("--scale", format!("{}, expected a positive number", self.scale));
        }
        let channels = self.channels.count();
        for (option, values) in [("--mean", &self.mean), ("--std", &self.std)] {
            if !(values.len() <= 1 || values.len() == channels) {
                return refuse(option, format!("{} values for {channels} channels", values.len()));
            }
            if let Some(bad) = values.iter().find(|v| !v.is_finite() || (option == "--std" && **v <= 0.0)) {
                return refuse(option, format!("{bad}, expected finite numbers, positive for --std"));
            }
        }
        Ok(())
    }
}

/// Reads all files into one array `x`, `[N, C, H, W]` or `[N, H, W, C]`, f32.
pub(super) fn read(files: &[PathBuf], options: &ImageOptions) -> Result<Array, DatasetError> {
    let mut bytes = Vec::new();
    let mut first: Option<(u32, u32)> = None;
    for file in files {
        let image = prepare(load(file)?, options, file)?;
        let size = (image.width(), image.height());
        if *first.get_or_insert(size) != size {
            let (w, h) = first.unwrap_or(size);
            let problem = format!(
                "is {}x{} pixels where the images before are {w}x{h}: give --resize and --crop",
                size.0, size.1
            );
            return Err(DatasetError::Corrupt { path: file.clone(), problem });
        }
        let sample = to_sample(&image, options);
        let want = sample.len() * 4;
        let full = bytes.try_reserve(want).is_err();
        if full {
            return Err(DatasetError::OutOfMemory { array: "x".into(), bytes: bytes.len() + want });
        }
        bytes.extend(sample.iter().flat_map(|value| value.to_le_bytes()));
    }
    let (width, height) = first.unwrap_or((0, 0));
    let (c, h, w) = (options.channels.count(), height as usize, width as usize);
    let shape = match options.layout {
        ImageLayout::Nchw => vec![files.len(), c, h, w],
        ImageLayout::Nhwc => vec![files.len(), h, w, c],
    };
    Array::new("x", shape, DType::F32, bytes)
}

fn load(file: &Path) -> Result<DynamicImage, DatasetError> {
    let mut reader =
        ImageReader::open(file).map_err(|source| DatasetError::Io { path: file.into(), source })?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(SIDE_MAX);
    limits.max_image_height = Some(SIDE_MAX);
    limits.max_alloc = Some(IMAGE_BYTES_MAX);
    reader.limits(limits);
    let corrupt = |problem: String| DatasetError::Corrupt { path: file.into(), problem };
    let reader = reader.with_guessed_format().map_err(|e| corrupt(format!("cannot be read: {e}")))?;
    reader.decode().map_err(|e| corrupt(format!("cannot be decoded: {e}")))
}

fn prepare(image: DynamicImage, options: &ImageOptions, file: &Path) -> Result<DynamicImage, DatasetError> {
    let corrupt = |problem: String| DatasetError::Corrupt { path: file.into(), problem };
    // 8-bit channels first: resizing then works on what is delivered.
    let image = match options.channels {
        Channels::Gray => DynamicImage::ImageLuma8(image.to_luma8()),
        Channels::Rgb | Channels::Bgr => DynamicImage::ImageRgb8(image.to_rgb8()),
    };
    let image = match options.resize {
        Some(side) => {
            let (w, h) = resized(image.width(), image.height(), side);
            if w > SIDE_MAX || h > SIDE_MAX {
                return Err(corrupt(format!("would be {w}x{h} pixels after --resize {side}")));
            }
            image.resize_exact(w, h, FilterType::Triangle)
        }
        None => image,
    };
    let Some(side) = options.crop else { return Ok(image) };
    let (w, h) = (image.width(), image.height());
    if w < side || h < side {
        return Err(corrupt(format!("is {w}x{h} pixels, smaller than --crop {side}")));
    }
    Ok(image.crop_imm((w - side) / 2, (h - side) / 2, side, side))
}

/// Size with the shorter side `side`, aspect kept, the longer side truncated as torchvision does.
fn resized(width: u32, height: u32, side: u32) -> (u32, u32) {
    let long = |long: u32, short: u32| {
        let scaled = u64::from(side) * u64::from(long) / u64::from(short.max(1));
        u32::try_from(scaled).unwrap_or(u32::MAX).max(1)
    };
    if width <= height { (side, long(height, width)) } else { (long(width, height), side) }
}

/// One sample in the layout asked for, normalised.
fn to_sample(image: &DynamicImage, options: &ImageOptions) -> Vec<f32> {
    let channels = options.channels.count();
    let pixels = image.as_bytes();
    let plane = pixels.len() / channels;
    let of = |values: &[f32], channel: usize, none: f32| match values {
        [] => none,
        [one] => *one,
        many => many[channel],
    };
    let mut out = vec![0.0; pixels.len()];
    for channel in 0..channels {
        let (mean, std) = (of(&options.mean, channel, 0.0), of(&options.std, channel, 1.0));
        let from = if options.channels == Channels::Bgr { 2 - channel } else { channel };
        for pixel in 0..plane {
            let value = (f32::from(pixels[pixel * channels + from]) / options.scale - mean) / std;
            let at = match options.layout {
                ImageLayout::Nchw => channel * plane + pixel,
                ImageLayout::Nhwc => pixel * channels + channel,
            };
            out[at] = value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, RgbImage};

    fn options() -> ImageOptions {
        ImageOptions { scale: 1.0, ..ImageOptions::default() }
    }

    fn write(folder: &Path, name: &str, width: u32, height: u32) -> PathBuf {
        let path = folder.join(name);
        RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, 200])).save(&path).unwrap();
        path
    }

    fn values(array: &Array) -> Vec<f32> {
        let bytes = array.slice(0..array.samples()).unwrap().bytes;
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn layouts_and_channel_orders_put_each_value_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let files = [write(folder.path(), "a.png", 2, 2)];
        let nchw = read(&files, &options()).unwrap();
        assert_eq!(nchw.shape, [1, 3, 2, 2]);
        assert_eq!(values(&nchw), [0., 1., 0., 1., 0., 0., 1., 1., 200., 200., 200., 200.]);
        let nhwc = read(&files, &ImageOptions { layout: ImageLayout::Nhwc, ..options() }).unwrap();
        assert_eq!(nhwc.shape, [1, 2, 2, 3]);
        assert_eq!(values(&nhwc)[..6], [0., 0., 200., 1., 0., 200.]);
        let bgr = read(&files, &ImageOptions { channels: Channels::Bgr, ..options() }).unwrap();
        assert_eq!(values(&bgr)[..4], [200.; 4]);
    }

    #[test]
    fn crop_is_centred_and_normalisation_is_scale_mean_std() {
        let folder = tempfile::tempdir().unwrap();
        let files = [write(folder.path(), "a.png", 6, 4)];
        let options = ImageOptions {
            crop: Some(2),
            scale: 2.0,
            mean: vec![1.0, 0.5, 0.0],
            std: vec![0.5],
            ..options()
        };
        // Columns 2 and 3, rows 1 and 2.
        let expect = [0., 1., 0., 1., 0., 0., 1., 1., 200., 200., 200., 200.];
        assert_eq!(values(&read(&files, &options).unwrap()), expect);
    }

    #[test]
    fn the_shorter_side_becomes_resize() {
        for (size, side, expect) in [
            ((500, 375), 256, (341, 256)),
            ((375, 500), 256, (256, 341)),
            ((10, 10), 4, (4, 4)),
            ((1000, 1), 1, (1000, 1)),
        ] {
            assert_eq!(resized(size.0, size.1, side), expect);
        }
    }

    #[test]
    fn images_of_two_sizes_are_refused_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let files = [write(folder.path(), "a.png", 4, 4), write(folder.path(), "b.png", 4, 5)];
        let error = read(&files, &options()).unwrap_err().to_string();
        assert!(error.contains("is 4x5 pixels where the images before are 4x4"), "{error}");
    }

    #[test]
    fn bad_options_are_named() {
        for (options, option) in [
            (ImageOptions { crop: Some(0), ..options() }, "--crop"),
            (ImageOptions { scale: 0.0, ..options() }, "--scale"),
            (ImageOptions { std: vec![1.0, 0.0, 1.0], ..options() }, "--std"),
            (ImageOptions { mean: vec![1.0, 0.0], ..options() }, "--mean"),
            (ImageOptions { mean: vec![f32::NAN], ..options() }, "--mean"),
        ] {
            let error = options.validate().unwrap_err().to_string();
            assert!(error.starts_with(&format!("image option {option}:")), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_no_image_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        std::fs::write(&path, b"not a picture").unwrap();
        assert!(matches!(read(&[path], &options()), Err(DatasetError::Corrupt { .. })));
    }
}
