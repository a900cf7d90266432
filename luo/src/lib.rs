//! LUO.
