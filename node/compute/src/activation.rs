//! Element-wise activations and their derivatives.

/// The element-wise function that follows a layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// `x`.
    #[default]
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, min), max)`.
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `x` if positive, else `slope * x`.
    LeakyRelu {
        /// Slope for negative inputs.
        slope: f32,
    },
    /// `x` if positive, else `slope * x`, with this row's slope.
    PRelu {
        /// Slope of this row.
        slope: f32,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `tanh(x)`.
    Tanh,
    /// `x * clamp(x / 6 + 0.5, 0, 1)`.
    HardSwish,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`, exact (erf).
    Gelu,
    /// GELU by the tanh approximation.
    GeluTanh,
}

impl Activation {
    /// `x = f(x)`.
    pub fn apply(self, x: &mut [f32]) {
        let _ = x;
    }
    /// `y = f(x)`, `derivative = f'(x)`.
    pub fn apply_and_derivative(self, x: &[f32], y: &mut [f32], derivative: &mut [f32]) {
        let _ = (x, y, derivative);
    }
}

/// In place `z = (f(z + bias) - target) * f'(z + bias)`.
pub fn residual(activation: Activation, bias: f32, z: &mut [f32], target: &[f32]) {
    let _ = (activation, bias, z, target);
}
