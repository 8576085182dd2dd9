//! Where sums of products are computed and kept: in this process, or on a CUDA device.
//!
//! Both take a shard's rows in the same order and end in the same integers for the same f32 products; the products themselves
//! have other last bits on another kind of device. A device without room for sums leaves them to the host, which adds the
//! same products to the same integers.
//! Not here: which rows there are, exponents and shards (`statistics`), whether a layer is worth a device (`agent`).

use crate::carry::Carried;
use crate::error::ExecError;
use crate::fixed_gram::{FixedGram, Part, UNITS_MAX, check_f32, power_of_two, too_large};
use crate::statistics::Exponents;
use halfstep_compute::cuda::{
    Cuda, CudaHalves, CudaProducts, CudaSums, Factors, GramShape, RowDigits, RowStaging, ShardGrams,
};
use halfstep_compute::{DeviceError, cpu};
use std::ops::Range;
use std::sync::Arc;

/// What sums products.
pub enum Summing<'a> {
    /// This thread.
    Cpu,
    /// A lane of a CUDA device.
    Cuda {
        /// Where rows are multiplied.
        lane: &'a Cuda,
        /// How they get there.
        staging: &'a mut RowStaging,
        /// The lane on which all of the device's sums are kept.
        home: &'a Arc<Cuda>,
        /// What every value of the rows is, by the job.
        digits: RowDigits,
    },
}

impl Summing<'_> {
    /// Whether rows of bfloat16 are read as they lie.
    pub(crate) fn takes_halves(&self) -> bool {
        matches!(self, Self::Cuda { digits: RowDigits::Bf16, .. })
    }

    /// Whether that is on the device that multiplies, as it reads rows.
    pub(crate) fn reads_in_place(&self, carried: &Carried) -> bool {
        match (self, carried) {
            (Self::Cuda { lane, digits: RowDigits::Bf16, .. }, Carried::OnDevice(there)) => {
                there.values.is_on(lane)
            }
            _ => false,
        }
    }
}

/// Matrices of one use of a layer, and their fixed points.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) cols: usize,
    pub(crate) groups: usize,
    pub(crate) exponents: Exponents,
}

impl Form {
    fn cross(self) -> bool {
        self.exponents.cross.is_some()
    }

    fn shape(self) -> GramShape {
        GramShape { cols: self.cols, groups: self.groups, cross: self.cross() }
    }

    /// H, C, G: what is kept, and the power of two.
    fn parts(self) -> impl Iterator<Item = (Part, i32)> {
        let cross = self.exponents.cross.map(|(c, g)| [(Part::Full, c), (Part::Lower, g)]);
        std::iter::once((Part::Lower, self.exponents.h)).chain(cross.into_iter().flatten())
    }

    fn factors(self) -> Factors {
        let (c, g) = self.exponents.cross.unwrap_or_default();
        [self.exponents.h, c, g].map(power_of_two)
    }
}

/// One shard's products, complete and found to fit.
#[derive(Debug)]
pub(crate) enum Products {
    /// H, C and G: `[groups, cols, cols]` each.
    Host(Vec<Vec<f32>>),
    Cuda {
        products: CudaProducts,
        home: Arc<Cuda>,
    },
}

/// One shard's products in the making.
pub(crate) enum Adding<'a> {
    Host { form: Form, matrices: Vec<Vec<f32>>, group: usize },
    Cuda { form: Form, grams: ShardGrams<'a>, home: Arc<Cuda> },
}

impl<'a> Adding<'a> {
    /// For at most `rows` rows.
    pub(crate) fn new(form: Form, summing: Summing<'a>, rows: usize) -> Result<Self, ExecError> {
        match summing {
            Summing::Cpu => {
                let len = form.cols * form.cols * form.groups;
                let matrices = form.parts().map(|_| vec![0.0; len]).collect();
                Ok(Self::Host { form, matrices, group: 0 })
            }
            Summing::Cuda { lane, staging, home, digits } => {
                let grams = ShardGrams::new(lane, staging, form.shape(), digits, rows)?;
                Ok(Self::Cuda { form, grams, home: Arc::clone(home) })
            }
        }
    }

    /// More rows of the group, `[n, cols]` on each stream.
    pub(crate) fn add(&mut self, x: &[f32], q: Option<&[f32]>) -> Result<(), ExecError> {
        match self {
            Self::Host { form, matrices, group } => {
                let (k, square) = (form.cols, form.cols * form.cols);
                let n = x.len() / k.max(1);
                let mut of_group = matrices.iter_mut().map(|all| &mut all[*group * square..][..square]);
                let (h, c, g) = (of_group.next(), of_group.next(), of_group.next());
                if let Some(h) = h {
                    cpu::gram_lower(q.unwrap_or(x), n, k, h);
                }
                if let (Some(q), Some(c), Some(g)) = (q, c, g) {
                    cpu::cross_gram(x, q, n, k, c);
                    cpu::gram_lower(x, n, k, g);
                }
                Ok(())
            }
            Self::Cuda { grams, .. } => Ok(grams.add(x, q)?),
        }
    }

    /// [`Self::add`] of bfloat16, as they lie: a device whose rows are such reads them so.
    pub(crate) fn add_halves(&mut self, x: &[u16], q: Option<&[u16]>) -> Result<(), ExecError> {
        match self {
            Self::Host { .. } => {
                let q = q.map(cpu::widen);
                self.add(&cpu::widen(x), q.as_deref())
            }
            Self::Cuda { grams, .. } => Ok(grams.add_halves(x, q)?),
        }
    }

    /// All of a group's rows, which stayed on the device that multiplies.
    pub(crate) fn add_staying(&mut self, x: &CudaHalves, q: Option<&CudaHalves>) -> Result<(), ExecError> {
        match self {
            Self::Host { .. } => {
                let q = q.map(CudaHalves::download).transpose()?;
                self.add_halves(&x.download()?, q.as_deref())
            }
            Self::Cuda { grams, .. } => Ok(grams.add_staying(x, q)?),
        }
    }

    /// Rows that follow are the next group's.
    pub(crate) fn end_group(&mut self) -> Result<(), ExecError> {
        match self {
            Self::Host { group, .. } => *group += 1,
            Self::Cuda { grams, .. } => grams.end_group()?,
        }
        Ok(())
    }

    /// # Errors
    /// `Internal` if an entry exceeds what was agreed on, `Device`.
    pub(crate) fn finish(self) -> Result<Products, ExecError> {
        match self {
            Self::Host { form, matrices, .. } => {
                let square = (form.cols * form.cols).max(1);
                for ((part, exponent), all) in form.parts().zip(&matrices) {
                    all.chunks(square).try_for_each(|one| check_f32(form.cols, part, exponent, one))?;
                }
                Ok(Products::Host(matrices))
            }
            Self::Cuda { form, grams, home } => {
                let (products, worst) = grams.finish(&form.factors())?;
                // Not `>`: a NaN is to be refused too.
                if worst <= UNITS_MAX { Ok(Products::Cuda { products, home }) } else { Err(too_large(worst)) }
            }
        }
    }
}

/// Exact sums of products of shards, wherever they are.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// H, C and G of each group; none before the first shard.
    host: Vec<Vec<FixedGram>>,
    /// One of each device that has summed a shard.
    cuda: Vec<CudaSums>,
}

impl Kept {
    /// Adds a shard's products. After an error the sums are worth nothing.
    pub(crate) fn add(&mut self, form: Form, products: &Products) -> Result<(), ExecError> {
        match products {
            Products::Host(matrices) => self.add_host(form, matrices),
            Products::Cuda { products, home } => match self.on_device(form, home) {
                Ok(sums) => sums.add(products, &form.factors())?,
                Err(DeviceError::OutOfMemory { .. }) => self.add_host(form, &products.download(home)?),
                Err(error) => return Err(error.into()),
            },
        }
        Ok(())
    }

    fn add_host(&mut self, form: Form, matrices: &[Vec<f32>]) {
        if self.host.is_empty() {
            let zeros = |(part, exponent)| vec![FixedGram::new(form.cols, part, exponent); form.groups];
            self.host = form.parts().map(zeros).collect();
        }
        let square = (form.cols * form.cols).max(1);
        for (sums, all) in self.host.iter_mut().zip(matrices) {
            sums.iter_mut().zip(all.chunks(square)).for_each(|(sum, one)| sum.add_checked(one));
        }
    }

    /// The sums on a device, begun where there are none.
    fn on_device(&mut self, form: Form, home: &Arc<Cuda>) -> Result<&mut CudaSums, DeviceError> {
        let at = match self.cuda.iter().position(|sums| sums.is_on(home)) {
            Some(at) => at,
            None => {
                self.cuda.push(CudaSums::new(Arc::clone(home), form.shape())?);
                self.cuda.len() - 1
            }
        };
        Ok(&mut self.cuda[at])
    }

    /// The integers of some rows, counted over all groups' matrices: of H, then of C and G.
    pub(crate) fn rows(&self, form: Form, rows: Range<usize>) -> Result<Vec<i64>, ExecError> {
        let len = form.parts().map(|(part, _)| part.entries_of(rows.clone(), form.cols)).sum();
        let mut all = Vec::with_capacity(len);
        for sums in &self.host {
            let row = |row: usize| sums[row / form.cols].row(row % form.cols);
            rows.clone().for_each(|number| all.extend_from_slice(row(number)));
        }
        for (number, sums) in self.cuda.iter().enumerate() {
            if number == 0 && self.host.is_empty() {
                sums.rows(rows.clone(), &mut |part| all.extend_from_slice(part))?;
                continue;
            }
            let mut rest = all.iter_mut();
            sums.rows(rows.clone(), &mut |part| {
                part.iter().zip(&mut rest).for_each(|(value, sum)| *sum = sum.wrapping_add(*value));
            })?;
        }
        all.resize(len, 0);
        Ok(all)
    }
}
