//! Planner, scheduler, assembly and export.
