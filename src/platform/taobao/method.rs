//! The platform's methods that give items, and what each takes and returns.

use std::fmt;

use super::item::PriceOf;

/// A method that gives items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `taobao.item.seller.get`: one item of the authorised seller, with its variants (apiId=24625).
    ItemSellerGet,
    /// `taobao.items.seller.list.get`: up to 20 of them (apiId=40575). Foreign and missing ids have no row, and are no
    /// error.
    ItemsSellerListGet,
    /// `taobao.tbk.item.info.get`: up to 40 items of anybody, for affiliates (apiId=24518); without variants.
    TbkItemInfoGet,
    /// `taobao.miniapp.items.get`: up to 50, for mini-apps (apiId=47621).
    MiniappItemsGet,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::ItemSellerGet, Self::ItemsSellerListGet, Self::TbkItemInfoGet, Self::MiniappItemsGet];

    /// The method of this name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }

    /// Its name in the protocol.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ItemSellerGet => "taobao.item.seller.get",
            Self::ItemsSellerListGet => "taobao.items.seller.list.get",
            Self::TbkItemInfoGet => "taobao.tbk.item.info.get",
            Self::MiniappItemsGet => "taobao.miniapp.items.get",
        }
    }

    /// The most ids that a call may have.
    #[must_use]
    pub const fn batch_max(self) -> usize {
        match self {
            Self::ItemSellerGet => 1,
            Self::ItemsSellerListGet => 20,
            Self::TbkItemInfoGet => 40,
            Self::MiniappItemsGet => 50,
        }
    }

    /// The parameter that carries the ids.
    #[must_use]
    pub const fn item_param(self) -> &'static str {
        match self {
            Self::ItemSellerGet => "num_iid",
            Self::ItemsSellerListGet | Self::TbkItemInfoGet | Self::MiniappItemsGet => "num_iids",
        }
    }

    /// What is asked for of each item; variants are asked for as `sku` and come as `skus`. `None`: the method has no
    /// such parameter.
    #[must_use]
    pub const fn fields(self) -> Option<&'static str> {
        match self {
            Self::ItemSellerGet | Self::ItemsSellerListGet | Self::MiniappItemsGet => {
                Some("num_iid,title,nick,price,num,cid,sku,approve_status,modified")
            }
            Self::TbkItemInfoGet => None,
        }
    }

    /// The key of a good reply: the name without `taobao.`, with underscores, and `_response`.
    #[must_use]
    pub fn response(self) -> String {
        let name = self.name();
        format!("{}_response", name.strip_prefix("taobao.").unwrap_or(name).replace('.', "_"))
    }

    /// Where in that response the rows are: a list in its wrapper, or the only item.
    #[must_use]
    pub const fn rows(self) -> &'static str {
        match self {
            Self::ItemSellerGet => "/item",
            Self::ItemsSellerListGet | Self::MiniappItemsGet => "/items/item",
            Self::TbkItemInfoGet => "/results/n_tbk_item",
        }
    }

    /// Which of a row's prices is the item's.
    #[must_use]
    pub const fn price(self) -> PriceOf {
        match self {
            Self::ItemSellerGet | Self::ItemsSellerListGet | Self::MiniappItemsGet => PriceOf::Price,
            Self::TbkItemInfoGet => PriceOf::ZkFinal,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_a_reply_follows_from_the_methods_name() {
        let keys: Vec<String> = Method::ALL.into_iter().map(Method::response).collect();
        assert_eq!(
            keys,
            [
                "item_seller_get_response",
                "items_seller_list_get_response",
                "tbk_item_info_get_response",
                "miniapp_items_get_response"
            ]
        );
        for method in Method::ALL {
            assert_eq!(Method::of_name(method.name()), Some(method));
        }
        assert_eq!(Method::of_name("taobao.items.list.get"), None);
    }
}
