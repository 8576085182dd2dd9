//! Compiles one body for every instruction-set level and picks one at run time.
//!
//! Not here: which level this machine has (`isa`), the bodies.

/// Defines `fn name(level, arguments..)`, which runs `body::<FUSED>(arguments..)` compiled for that level.
///
/// # Panics
/// The function panics if this machine lacks the level.
macro_rules! leveled {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        fn $name(level: $crate::cpu::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
            fn avx512($($arg: $type),*) {
                $body::<true>($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) {
                $body::<true>($($arg),*);
            }
            assert!(level <= $crate::cpu::isa(), "this machine lacks {}", level.name());
            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `level <= isa()`, and `isa()` found these features on this machine.
                $crate::cpu::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::cpu::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => $body::<false>($($arg),*),
            }
        }
    };
}

pub(crate) use leveled;
