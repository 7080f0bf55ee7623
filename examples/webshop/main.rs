//! A webshop on events. For now: the parts that know nothing of events, one after another.

mod flags;
mod invoice;
mod label;
mod orders;
mod pdf;
mod report;
mod text;

use std::error::Error;
use std::fs;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use clap::Parser;

use flags::Flags;
use orders::Order;
use report::{Delays, Hop, Progress, ServiceRow, Standing, Trouble};

fn main() -> Result<(), Box<dyn Error>> {
    let flags = Flags::parse();
    println!("{flags:?}");
    let orders = orders::open(&flags.orders.clone().unwrap_or_default())?;
    let orders: Box<dyn Iterator<Item = _>> = match flags.count {
        Some(count) => Box::new(orders.exactly(count.get())),
        None => Box::new(orders),
    };
    let (start, mut progress) = (Instant::now(), Progress::new(io::stdout().is_terminal()));
    let (mut standing, mut delays) = (Standing::default(), Vec::new());
    for order in orders {
        match order {
            Ok(order) => delays.push(handle(&flags, &order)?),
            Err(bad) => eprintln!("{bad} (last: {})", bad.is_last),
        }
        standing.placed += 1;
        if let Some(shown) = progress.show(start.elapsed(), &standing) {
            print!("{shown}");
        }
    }
    print!("{}", progress.finish(start.elapsed(), &standing));
    show(standing.placed, delays);
    Ok(())
}

fn handle(flags: &Flags, order: &Order) -> Result<Duration, Box<dyn Error>> {
    let start = Instant::now();
    let pdf = invoice::render(order);
    if let Some(out) = &flags.out {
        fs::create_dir_all(out)?;
        fs::write(out.join(invoice::file_name(&order.order_id)), pdf)?;
    }
    let label = label::print(order);
    if order.customer.country == "JP" {
        println!("\n{} {} {}\n{}", label.carrier, label.tracking_number, invoice::total_cents(order), label.text);
    }
    Ok(start.elapsed())
}

fn show(count: u64, delays: Vec<Duration>) {
    let (event, service) = ("shop.order.placed".to_owned(), "Billing".to_owned());
    println!(
        "{}",
        report::service_table(&[ServiceRow { service: service.clone(), handled: count, ..ServiceRow::default() }])
    );
    println!("{}", report::delay_table(&[Delays { event: event.clone(), delays }]));
    let hop = Hop { event: event.clone(), from: "Shop".to_owned(), to: service.clone(), count };
    println!("{}", report::sequence_diagram(&[hop], &[Trouble { event, service, retries: 5, dead_letters: 1 }]));
}
