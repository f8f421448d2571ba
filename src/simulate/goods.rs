//! Goods as Taobao, its resellers and the articles' 1688 show them: the same for the same id, each in its own form.

use std::fmt::Write as _;

use super::{
    dice::{Question, below, next, roll},
    product::{COLOURS, Showing, Yuan, base_fen, drifted, name},
};
use crate::platform::taobao;
use crate::runtime::clock::Timestamp;

/// One article in so many costs nothing after its coupon.
const FREE: u64 = 200;

/// An article.
#[derive(Debug)]
pub(super) struct Good {
    id: u64,
    title: String,
    nick: String,
    category: u32,
    /// The price now.
    fen: u64,
    stock: u64,
    status: &'static str,
    modified: String,
    bits: u64,
}

impl Good {
    pub(super) fn new(showing: Showing) -> Self {
        let Showing { seed, id, status, now, drift } = showing;
        let mut bits = roll(seed, Question::Product, id ^ 0x7a0b_a000_0000_0000);
        let base_fen = base_fen(&mut bits);
        let changed_at = 1_420_041_600_000 + below(next(&mut bits), 3_000) * 86_400_000;
        let (permille, changed_at) = drifted(next(&mut bits), now, drift).unwrap_or((1_000, changed_at));
        let (title, category) = name(&mut bits);
        Self {
            id,
            title,
            nick: format!("店铺{}", below(next(&mut bits), 5_000)),
            category,
            fen: (base_fen * permille + 500) / 1_000,
            stock: below(next(&mut bits), 20_000),
            status,
            modified: taobao::timestamp(Timestamp::from_millis(i64::try_from(changed_at).unwrap_or_default())),
            bits,
        }
    }

    /// A row of TOP: money as text, variants in a wrapper.
    pub(super) fn top(&self, with_variants: bool) -> String {
        let Self { id, title, nick, category, stock, status, modified, .. } = self;
        let skus = if with_variants { format!(r#","skus":{}"#, self.skus()) } else { String::new() };
        format!(
            r#"{{"num_iid":{id},"title":"{title}","nick":"{nick}","price":"{}","num":{stock},"cid":{category},"approve_status":"{status}","modified":"{modified}"{skus}}}"#,
            Yuan(self.fen)
        )
    }

    /// A row of `taobao.tbk.item.info.get`.
    pub(super) fn affiliate(&self) -> String {
        let Self { id, title, nick, stock, .. } = self;
        let (list, price) = (Yuan(self.fen + self.fen / 8), Yuan(self.fen));
        format!(
            r#"{{"num_iid":{id},"title":"{title}","nick":"{nick}","reserve_price":"{list}","zk_final_price":"{price}","volume":{stock},"cat_name":"居家日用"}}"#
        )
    }

    /// A row of the article's reseller: ids and prices are numbers or texts, as it comes.
    pub(super) fn pool(&self) -> String {
        let is_free = self.bits.is_multiple_of(FREE);
        let price = Yuan(if is_free { 0 } else { self.fen }).to_string();
        let quoted = |text: &str, bit: u64| {
            if self.bits & bit == 0 { text.to_owned() } else { format!("\"{text}\"") }
        };
        format!(
            r#"{{"num_iid":{},"title":"{}","nick":"{}","price":"{}","final_price":{}}}"#,
            quoted(&self.id.to_string(), 1 << 20),
            self.title,
            self.nick,
            Yuan(self.fen + self.fen / 8),
            quoted(&price, 1 << 21)
        )
    }

    /// The item of `OneBound`: nearly everything is text.
    pub(super) fn onebound(&self) -> String {
        let Self { id, title, nick, category, stock, .. } = self;
        let (price, list) = (Yuan(self.fen), Yuan(self.fen + self.fen / 8));
        format!(
            r#"{{"num_iid":"{id}","title":"{title}","price":"{price}","orginal_price":"{list}","nick":"{nick}","num":"{stock}","cid":"{category}","skus":{}}}"#,
            self.skus()
        )
    }

    /// The item of the article with `alibaba.item.get`.
    pub(super) fn item_get(&self) -> String {
        let Self { id, title, nick, category, .. } = self;
        format!(
            r#"{{"item_id":"{id}","title":"{title}","price":"{}","sku_info":{},"category_id":"{category}","seller_nick":"{nick}"}}"#,
            Yuan(self.fen),
            self.skus()
        )
    }

    /// The product of the article with `/router/json`.
    pub(super) fn router(&self) -> String {
        let Self { id, title, stock, .. } = self;
        format!(
            r#"{{"id":{id},"title":"{title}","price":{},"quantity":{stock},"detail":"<p>{title}</p>"}}"#,
            Yuan(self.fen)
        )
    }

    fn skus(&self) -> String {
        let (mut bits, mut json) = (self.bits, r#"{"sku":["#.to_owned());
        for index in 0..=below(next(&mut bits), 3) {
            let separator = if index == 0 { "" } else { "," };
            let colour = COLOURS[usize::try_from(below(next(&mut bits), COLOURS.len() as u64)).unwrap_or(0)];
            // Writing to a String cannot fail.
            let _ = write!(
                json,
                r#"{separator}{{"sku_id":{},"price":"{}","quantity":{},"properties_name":"1627207:{}:颜色分类:{colour}"}}"#,
                self.id * 8 + index,
                Yuan(self.fen + self.fen * index / 20),
                below(next(&mut bits), 3_000),
                28_320 + index,
            );
        }
        json.push_str("]}");
        json
    }
}
