//! What there is of CUDA on this machine and what is missing, without touching a device.
//!
//! Every question is asked only after the answers it rests on, so that a machine with nothing, with a driver but no card,
//! or with libraries missing gets a report, never a panic. Not here: using any of it (`device`).
#![expect(unsafe_code, reason = "calls of the driver and of cuBLAS that have no safe form")]

use std::ffi::c_int;

use cudarc::cublas::sys as blas;
use cudarc::driver::{CudaContext, result, sys};
use cudarc::nvrtc::sys as nvrtc;

use super::error::sentence;
use super::libraries::{Library, guarded};

/// Oldest driver interface with every call that is made.
const DRIVER_MIN: Version = Version(12, 1);
/// Oldest compute capability that is used.
pub(super) const CAPABILITY_MIN: (i32, i32) = (8, 0);

/// A version, major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(i32, i32);

impl Version {
    /// From the driver's 1000 * major + 10 * minor.
    fn from_thousands(packed: i32) -> Self {
        Self(packed / 1000, packed % 1000 / 10)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// A library's version, or why it is of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It works.
    Version(String),
    /// It does not.
    Missing(String),
}

impl Found {
    fn usable(&self) -> Result<(), String> {
        match self {
            Self::Version(_) => Ok(()),
            Self::Missing(reason) => Err(reason.clone()),
        }
    }
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// What its maker calls it.
    pub name: String,
    /// Bytes of memory, in use or not.
    pub memory_bytes: u64,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The driver and the newest CUDA it knows.
    pub driver: Found,
    /// Devices, if the driver works.
    pub devices: Vec<Gpu>,
    /// cuBLAS.
    pub blas: Found,
    /// NVRTC, the compiler of kernels.
    pub compiler: Found,
}

impl Probe {
    /// Whether a solve could run; else the first reason why not.
    ///
    /// # Errors
    /// The reason, a sentence for people.
    pub fn usable(&self) -> Result<(), String> {
        self.driver.usable()?;
        if self.devices.is_empty() {
            return Err("the driver finds no CUDA device".into());
        }
        if let Some(old) = self.devices.iter().find(|gpu| gpu.capability < CAPABILITY_MIN)
            && self.devices.iter().all(|gpu| gpu.capability < CAPABILITY_MIN)
        {
            return Err(old.too_old());
        }
        self.blas.usable()?;
        self.compiler.usable()
    }

    /// One device that can be used.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn device(&self, ordinal: usize) -> Result<&Gpu, String> {
        self.usable()?;
        let gpu = self.devices.iter().find(|gpu| gpu.ordinal == ordinal);
        let gpu = gpu.ok_or_else(|| {
            format!("there is no device {ordinal}, expected 0 to {}", self.devices.len().saturating_sub(1))
        })?;
        match gpu.capability < CAPABILITY_MIN {
            true => Err(gpu.too_old()),
            false => Ok(gpu),
        }
    }
}

impl Gpu {
    fn too_old(&self) -> String {
        let ((major, minor), (least, sub)) = (self.capability, CAPABILITY_MIN);
        format!(
            "device {} ({}) has compute capability {major}.{minor}, expected {least}.{sub} or newer",
            self.ordinal, self.name
        )
    }
}

/// Looks.
pub fn probe() -> Probe {
    let driver = guarded(driver).unwrap_or_else(Found::Missing);
    let (driver, devices) = match driver.usable() {
        Ok(()) => match guarded(devices).unwrap_or_else(Err) {
            Ok(devices) => (driver, devices),
            Err(reason) => (Found::Missing(reason), Vec::new()),
        },
        Err(_) => (driver, Vec::new()),
    };
    Probe {
        driver,
        devices,
        blas: found(Library::Blas, "cuBLAS", blas_version),
        compiler: found(Library::Nvrtc, "NVRTC", compiler_version),
    }
}

fn found(library: Library, name: &str, version: fn() -> Result<String, String>) -> Found {
    if !library.is_present() {
        return Found::Missing(absent(library, name));
    }
    match guarded(version).unwrap_or_else(Err) {
        Ok(version) => Found::Version(version),
        Err(reason) => Found::Missing(format!("{name} does not answer: {reason}")),
    }
}

fn absent(library: Library, name: &str) -> String {
    format!("{name} is missing: the loader finds no {}", library.file())
}

fn driver() -> Found {
    if !Library::Driver.is_present() {
        return Found::Missing(absent(Library::Driver, "the NVIDIA driver"));
    }
    if let Err(error) = result::init() {
        return Found::Missing(format!("the NVIDIA driver does not start: {}", sentence(error)));
    }
    let mut packed: c_int = 0;
    // SAFETY: writes one integer to where it is told.
    if let Err(error) = unsafe { sys::cuDriverGetVersion(&raw mut packed) }.result() {
        return Found::Missing(format!("the NVIDIA driver does not answer: {}", sentence(error)));
    }
    match Version::from_thousands(packed) {
        old if old < DRIVER_MIN => Found::Missing(format!(
            "the NVIDIA driver is too old: it knows CUDA {old}, expected {DRIVER_MIN} or newer"
        )),
        version => Found::Version(format!("CUDA {version}")),
    }
}

fn devices() -> Result<Vec<Gpu>, String> {
    let count = CudaContext::device_count().map_err(sentence)?;
    (0..count).map(|ordinal| gpu(ordinal).map_err(sentence)).collect()
}

fn gpu(ordinal: c_int) -> Result<Gpu, cudarc::driver::DriverError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: the device comes from the driver, a line above.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    Ok(Gpu {
        ordinal: ordinal.unsigned_abs() as usize,
        name: result::device::get_name(device)?,
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
    })
}

fn blas_version() -> Result<String, String> {
    let part = |which| {
        let mut value: c_int = 0;
        // SAFETY: writes one integer to where it is told.
        let status = unsafe { blas::cublasGetProperty(which, &raw mut value) };
        status.result().map(|()| value).map_err(|error| error.to_string())
    };
    use blas::libraryPropertyType as Part;
    Ok(format!("{}.{}", part(Part::MAJOR_VERSION)?, part(Part::MINOR_VERSION)?))
}

fn compiler_version() -> Result<String, String> {
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: writes two integers to where it is told.
    let status = unsafe { nvrtc::nvrtcVersion(&raw mut major, &raw mut minor) };
    status.result().map_err(|error| format!("{error:?}"))?;
    Ok(Version(major, minor).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> Probe {
        let gpu =
            |ordinal, capability| Gpu { ordinal, name: "Test".into(), memory_bytes: 1 << 30, capability };
        Probe {
            driver: Found::Version("CUDA 13.0".into()),
            devices: vec![gpu(0, (9, 0)), gpu(1, (7, 5))],
            blas: Found::Version("13.0".into()),
            compiler: Found::Version("13.0".into()),
        }
    }

    #[test]
    fn the_first_thing_missing_is_the_reason() {
        assert_eq!(whole().usable(), Ok(()));
        let missing = |name: &str| Found::Missing(format!("{name} is missing"));
        let reason = |change: fn(&mut Probe, Found), what: &str| {
            let mut probe = whole();
            change(&mut probe, missing(what));
            probe.usable().unwrap_err()
        };
        assert_eq!(reason(|probe, found| probe.compiler = found, "NVRTC"), "NVRTC is missing");
        assert_eq!(reason(|probe, found| probe.blas = found, "cuBLAS"), "cuBLAS is missing");
        assert_eq!(
            reason(|probe, found| (probe.driver, probe.blas) = (found.clone(), found), "it"),
            "it is missing"
        );
        assert_eq!(reason(|probe, _| probe.devices.clear(), ""), "the driver finds no CUDA device");
    }

    #[test]
    fn devices_are_refused_by_number_and_by_age() {
        let probe = whole();
        assert_eq!(probe.device(0).unwrap().name, "Test");
        let error = probe.device(1).unwrap_err();
        assert_eq!(error, "device 1 (Test) has compute capability 7.5, expected 8.0 or newer");
        assert_eq!(probe.device(2).unwrap_err(), "there is no device 2, expected 0 to 1");
        let old = Probe { devices: probe.devices[1..].to_vec(), ..probe };
        assert!(old.usable().unwrap_err().contains("compute capability 7.5"));
    }

    #[test]
    fn versions_read_like_the_drivers() {
        assert_eq!(Version::from_thousands(12080).to_string(), "12.8");
        assert!(Version::from_thousands(11080) < DRIVER_MIN);
    }

    #[test]
    fn any_machine_gets_a_report() {
        let found = probe();
        assert!(found.usable().is_ok() || !found.usable().unwrap_err().is_empty());
    }
}
