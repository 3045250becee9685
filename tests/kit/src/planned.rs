//! Panics that are part of a test.

/// Silences panics that say "as planned"; the rest of them are worth reading.
pub fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.payload().downcast_ref::<&str>() != Some(&"as planned") {
                loud(panic);
            }
        }));
    });
}
