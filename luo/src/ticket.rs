//! A ticket proves that the running kernel was entered by one particular switch.
//!
//! Memory that survives a kexec can survive a reset too, or a kexec into a kernel that could not reach the
//! memory and booted its VMs from their disks. The sessions in the memory are outdated then, because the
//! disks have changed since. So a switch writes a ticket beside the sessions and onto the next kernel's
//! command line, and sessions are given out only if both tickets are equal. A ticket is unique; it is not
//! secret.

use std::fmt;
use std::str::FromStr;

/// Identifies a switch. As text it has 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket([u8; 16]);

/// A text that is not a ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the ticket of a switch: a ticket has 32 hexadecimal digits")]
pub struct TicketError(String);

impl Ticket {
    /// The ticket with these bytes.
    pub fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        // The parser of numbers would accept a sign, too.
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        number.map(|number| Self(number.to_be_bytes())).ok_or_else(|| TicketError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_survives_its_text() {
        for bytes in [[0; 16], [0xff; 16], *b"0123456789abcdef"] {
            let ticket = Ticket::new(bytes);
            assert_eq!(ticket.to_string().parse(), Ok(ticket));
            assert_eq!((ticket.to_string().len(), ticket.to_bytes()), (32, bytes));
        }
    }

    #[test]
    fn a_text_that_is_not_a_ticket_is_named_in_the_error() {
        let short = "0".repeat(31);
        let long = "0".repeat(33);
        let signed = format!("+{short}");
        let wrong = format!("g{short}");
        for text in ["", &short, &long, &signed, &wrong, "ä"] {
            let error = text.parse::<Ticket>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
