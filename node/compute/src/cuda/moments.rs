//! Second moments on a device: products with the difference of two, comparisons in f64, normal equations, and what is to be known of
//! them before a solve.
//!
//! What f64 needs is made of f32 in tiles of bounded size, whatever the layer. Tiles and their order depend on the shape alone.
//! Not here: argument order and grids (`kernels::moments`), what the numbers mean (`solver`).
#![expect(unsafe_code, reason = "products of f64 on raw device addresses, checked here")]

use super::blas::WORKSPACE_BYTES;
use super::column_major::ColumnMajor;
use super::device::{Cuda, CudaBuffer, count, offset};
use super::kernels::moments::{self as kernels, Groups, Source, Tile};
use crate::device::{Device, DeviceError, MatMut, MatRef, Moments, Product};
use crate::shape::area;

/// Largest side of a tile of f64: 8 MiB, and three of them at once.
const SIDE: usize = 1024;
/// Elements of a slab of rows of f32: 64 MiB.
const SLAB: usize = 16 << 20;

/// Addresses of what a comparison reads: errors `[rows, cols]` twice, and the source of each product's right side.
struct Compared {
    first: u64,
    second: u64,
    h: Source,
    /// Weights, and `h - c`.
    gap: Option<(u64, Source)>,
}

/// Scratch of a comparison: a tile of the left factor, one of the right, one of their product, and the rows' sums.
struct Tiles {
    left: CudaBuffer<f64>,
    right: CudaBuffer<f64>,
    slope: CudaBuffer<f64>,
    sums: CudaBuffer<f64>,
}

impl Cuda {
    /// The address of moments and of their diagonal.
    fn moments(&self, what: Moments<'_, CudaBuffer>, cols: usize) -> Result<Source, DeviceError> {
        let plus = self.read("moments", what.matrix, area(cols, cols))?;
        let diagonal = what.diagonal.map(|diagonal| self.read("diagonal of moments", diagonal, cols));
        Ok(Source { plus, diagonal: diagonal.transpose()?.unwrap_or(0), minus: 0, factor: -1.0 })
    }

    /// See [`Device::multiply_moments`].
    pub(super) fn moment_products(
        &self,
        rows: usize,
        cols: usize,
        w: &CudaBuffer,
        plus: Moments<'_, CudaBuffer>,
        minus: Option<&CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        if plus.diagonal.is_none() && minus.is_none() {
            return self.matmul(
                Product::new(rows, cols, cols),
                MatRef::new(w, cols),
                MatRef::new(plus.matrix, cols),
                MatMut::new(out, cols),
            );
        }
        let mut source = self.moments(plus, cols)?;
        if let Some(minus) = minus {
            source.minus = self.read("moments to subtract", minus, area(cols, cols))?;
        }
        let height = (SLAB / cols.max(1)).clamp(1, cols.max(1));
        let mut slab = self.allocate::<f32>(area(height, cols))?;
        let stride = count("moments columns", cols)?;
        for top in (0..cols).step_by(height) {
            let depth = height.min(cols - top);
            let to = self.written("moments slab", &mut slab, area(depth, cols))?;
            let (depth_count, top_count) = (count("moments rows", depth)?, count("moments rows", top)?);
            let tile = Tile { rows: depth_count, width: stride, top: top_count, left: 0, stride };
            self.launch(kernels::subtract_rows(self.opened.size, tile, source, to))?;
            let beta = if top == 0 { 0.0 } else { 1.0 };
            self.matmul(
                Product { beta, ..Product::new(rows, cols, depth) },
                MatRef::new(w, cols).at(top),
                MatRef::new(&slab, cols),
                MatMut::new(out, cols),
            )?;
        }
        Ok(())
    }

    /// See [`Device::exact_differences`].
    pub(super) fn differences(
        &self,
        rows: usize,
        cols: usize,
        (first, second): (&CudaBuffer, &CudaBuffer),
        h: Moments<'_, CudaBuffer>,
        gap: Option<(&CudaBuffer, &CudaBuffer)>,
    ) -> Result<Vec<f64>, DeviceError> {
        let len = area(rows, cols);
        let h = self.moments(h, cols)?;
        let gap = match gap {
            Some((w, c)) => {
                let minus = self.read("difference c", c, area(cols, cols))?;
                Some((self.read("difference w", w, len)?, Source { minus, ..h }))
            }
            None => None,
        };
        let first = self.read("difference first", first, len)?;
        let second = self.read("difference second", second, len)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        let (height, side) = (rows.min(SIDE), cols.min(SIDE));
        let mut tiles = Tiles {
            left: self.allocate(height * side)?,
            right: self.allocate(side * side)?,
            slope: self.allocate(height * side)?,
            sums: self.allocate(rows)?,
        };
        self.stream.memset_zeros(&mut tiles.sums.slice).map_err(|error| self.driver(error))?;
        let compared = Compared { first, second, h, gap };
        for top in (0..rows).step_by(height) {
            for left in (0..cols).step_by(side) {
                let tile = Tile {
                    rows: count("difference rows", height.min(rows - top))?,
                    width: count("difference columns", side.min(cols - left))?,
                    top: count("difference rows", top)?,
                    left: count("difference columns", left)?,
                    stride: count("difference columns", cols)?,
                };
                self.slope(&compared, tile, &mut tiles)?;
                self.add_dots(&compared, tile, &mut tiles)?;
            }
        }
        self.bring("difference sums", &tiles.sums, 0..rows)
    }

    /// `slope = (first + second) h + 2 w (h - c)`, the tile's rows and columns.
    fn slope(&self, compared: &Compared, tile: Tile, tiles: &mut Tiles) -> Result<(), DeviceError> {
        let size = self.opened.size;
        let Compared { first, second, h, ref gap } = *compared;
        let both = Source { plus: first, diagonal: 0, minus: second, factor: 1.0 };
        let depths = (0..tile.stride).step_by(SIDE);
        for (number, start) in depths.enumerate() {
            let depth = (tile.stride - start).min(SIDE as u32);
            let left = Tile { width: depth, left: start, ..tile };
            let right = Tile { rows: depth, top: start, ..tile };
            let [to_left, to_right] =
                [&mut tiles.left, &mut tiles.right].map(|to| self.written("tile", to, 0));
            let (to_left, to_right) = (to_left?, to_right?);
            self.launch(kernels::widen(size, left, both, to_left))?;
            self.launch(kernels::widen(size, right, h, to_right))?;
            self.add_product(tile, depth, (1.0, if number == 0 { 0.0 } else { 1.0 }), tiles)?;
            if let Some((w, gap)) = *gap {
                let weights = Source { plus: w, minus: 0, ..both };
                self.launch(kernels::widen(size, left, weights, to_left))?;
                self.launch(kernels::widen(size, right, gap, to_right))?;
                self.add_product(tile, depth, (2.0, 1.0), tiles)?;
            }
        }
        Ok(())
    }

    /// `slope = alpha * left * right + beta * slope`, of the depth given.
    fn add_product(
        &self,
        tile: Tile,
        depth: u32,
        factors: (f64, f64),
        tiles: &mut Tiles,
    ) -> Result<(), DeviceError> {
        let (rows, width, depth) = (tile.rows as usize, tile.width as usize, depth as usize);
        let left = self.read("tile", &tiles.left, rows * depth)?;
        let right = self.read("tile", &tiles.right, depth * width)?;
        let slope = self.written("slope", &mut tiles.slope, rows * width)?;
        let args = ColumnMajor::new(Product::new(rows, width, depth), (depth, false), (width, false), width)?;
        self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
        // SAFETY: three arrays of their own, whose lengths were checked above.
        let multiplied = unsafe { self.blas.product_f64(&args, factors, right, left, slope) };
        multiplied.map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))
    }

    fn add_dots(&self, compared: &Compared, tile: Tile, tiles: &mut Tiles) -> Result<(), DeviceError> {
        let (top, stride) = (tile.top as usize, tile.stride as usize);
        let errors = (offset(compared.first, top * stride), offset(compared.second, top * stride));
        let slope = self.read("slope", &tiles.slope, tile.rows as usize * tile.width as usize)?;
        let sums = self.written("difference sums", &mut tiles.sums, top + tile.rows as usize)?;
        let sums = sums + (top * size_of::<f64>()) as u64;
        self.launch(kernels::difference_dots(self.opened.size, tile, errors, slope, sums))
    }

    /// See [`Device::normal_equations`].
    pub(super) fn normals(
        &self,
        (rows, cols, width): (usize, usize, usize),
        levels: &CudaBuffer,
        h: &CudaBuffer,
        scratch: &mut CudaBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        let width = width.clamp(1, cols.max(1));
        let groups = cols.div_ceil(width);
        let entries = area(area(rows, groups), groups);
        let from = self.read("normal levels", levels, area(rows, cols))?;
        self.read("normal h", h, area(cols, cols))?;
        self.written("normal scratch", scratch, area(rows, cols))?;
        if entries == 0 {
            return Ok(Vec::new());
        }
        let mut normal = self.allocate::<f64>(entries)?;
        self.stream.memset_zeros(&mut normal.slice).map_err(|error| self.driver(error))?;
        for group in 0..groups {
            let start = group * width;
            let end = cols.min(start + width);
            self.matmul(
                Product::new(rows, end, end - start),
                MatRef::new(levels, cols).at(start),
                MatRef::new(h, cols).at(start * cols),
                MatMut::new(scratch, end),
            )?;
            let shape = Groups {
                rows: count("normal rows", rows)?,
                cols: count("normal columns", cols)?,
                width: count("normal group", width)?,
                groups: count("normal groups", groups)?,
                group: count("normal groups", group)?,
                end: count("normal columns", end)?,
            };
            let product = self.read("normal scratch", scratch, rows * end)?;
            let to = self.written("normal equations", &mut normal, entries)?;
            self.launch(kernels::group_dots(self.opened.size, shape, product, from, to))?;
        }
        self.bring("normal equations", &normal, 0..entries)
    }

    /// See [`Device::column_gaps`].
    pub(super) fn gaps(
        &self,
        cols: usize,
        a: &CudaBuffer,
        b: &CudaBuffer,
    ) -> Result<(Vec<f32>, bool), DeviceError> {
        let (a, b) = (self.read("gap a", a, area(cols, cols))?, self.read("gap b", b, area(cols, cols))?);
        if cols == 0 {
            return Ok((Vec::new(), false));
        }
        let (mut squares, mut differing) = (self.allocate::<f32>(cols)?, self.allocate::<u32>(cols)?);
        let to = (
            self.written("gap squares", &mut squares, cols)?,
            self.written("gap columns", &mut differing, cols)?,
        );
        self.launch(kernels::column_gaps(count("gap columns", cols)?, a, b, to.0, to.1))?;
        let differing: Vec<u32> = self.bring("gap columns", &differing, 0..cols)?;
        Ok((self.bring("gap squares", &squares, 0..cols)?, differing.iter().any(|differs| *differs != 0)))
    }

    /// See [`Device::set_diagonal`].
    pub(super) fn replace_diagonal(
        &self,
        n: usize,
        diagonal: &CudaBuffer,
        matrix: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let diagonal = self.read("diagonal", diagonal, n)?;
        let matrix = self.written("diagonal matrix", matrix, area(n, n))?;
        match n {
            0 => Ok(()),
            n => {
                self.launch(kernels::set_diagonal(self.opened.size, count("diagonal", n)?, diagonal, matrix))
            }
        }
    }
}
