//! The protocols that a source can speak: which keys each of them has, their defaults, and what is made of them.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Vendor,
    ali1688::{self, Ali1688},
    config::{Problem, SourceConfig, is_word, require},
    reseller::{self, Reseller},
    taobao::{self, Taobao},
};

/// Which protocol a source speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// 1688's open platform.
    #[serde(rename = "ali1688")]
    Ali1688,
    /// Taobao's open platform (TOP).
    #[serde(rename = "taobao")]
    Taobao,
    /// A reseller of Taobao's data.
    #[serde(rename = "taobao_reseller")]
    TaobaoReseller,
}

/// Which form of a protocol, where there are several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dialect {
    /// `ali1688`: the gateway's own.
    #[serde(rename = "aop")]
    Aop,
    /// `ali1688`: `/router/json`, as an article has it.
    #[serde(rename = "router")]
    Router,
    /// `ali1688`: `alibaba.item.get`, as an article has it.
    #[serde(rename = "item-get")]
    ItemGet,
    /// `taobao_reseller`: up to 40 ids a call, as an article has it.
    #[serde(rename = "pool")]
    Pool,
    /// `taobao_reseller`: `OneBound`'s, one id a call.
    #[serde(rename = "onebound")]
    OneBound,
}

/// A kind with its dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Ali(ali1688::Dialect),
    Top,
    Reseller(reseller::Dialect),
}

/// What a form's keys are unless the configuration says otherwise; an empty text is a key that it does not have.
#[derive(Default)]
struct Defaults {
    url: &'static str,
    authorise_url: &'static str,
    api: &'static str,
    version: &'static str,
    item_param: &'static str,
    params: Vec<(&'static str, &'static str)>,
}

impl Form {
    /// `None` if the dialect is none of this kind.
    fn of(kind: Kind, dialect: Option<Dialect>) -> Option<Self> {
        Some(match (kind, dialect) {
            (Kind::Ali1688, None | Some(Dialect::Aop)) => Self::Ali(ali1688::Dialect::Aop),
            (Kind::Ali1688, Some(Dialect::Router)) => Self::Ali(ali1688::Dialect::Router),
            (Kind::Ali1688, Some(Dialect::ItemGet)) => Self::Ali(ali1688::Dialect::ItemGet),
            (Kind::Taobao, None) => Self::Top,
            (Kind::TaobaoReseller, None | Some(Dialect::Pool)) => Self::Reseller(reseller::Dialect::Pool),
            (Kind::TaobaoReseller, Some(Dialect::OneBound)) => Self::Reseller(reseller::Dialect::OneBound),
            (Kind::Ali1688 | Kind::Taobao | Kind::TaobaoReseller, Some(_)) => return None,
        })
    }

    const fn dialect(self) -> Option<Dialect> {
        match self {
            Self::Ali(ali1688::Dialect::Aop) => Some(Dialect::Aop),
            Self::Ali(ali1688::Dialect::Router) => Some(Dialect::Router),
            Self::Ali(ali1688::Dialect::ItemGet) => Some(Dialect::ItemGet),
            Self::Top => None,
            Self::Reseller(reseller::Dialect::Pool) => Some(Dialect::Pool),
            Self::Reseller(reseller::Dialect::OneBound) => Some(Dialect::OneBound),
        }
    }

    /// `api` is what the configuration says, or nothing.
    fn defaults(self, api: &str) -> Defaults {
        match self {
            Self::Ali(dialect) => of_ali(dialect),
            Self::Top => {
                let method = taobao::Method::of_name(api).unwrap_or(taobao::Method::ItemsSellerListGet);
                Defaults {
                    url: "https://gw.api.taobao.com/router/rest",
                    api: method.name(),
                    item_param: method.item_param(),
                    params: method.fields().into_iter().map(|fields| ("fields", fields)).collect(),
                    ..Defaults::default()
                }
            }
            Self::Reseller(dialect) => {
                let (url, more) = match dialect {
                    reseller::Dialect::Pool => ("https://o0b.cn/ibrad/taobao/item_get/", None),
                    // What it has in its cache may be old, and it is on by default.
                    reseller::Dialect::OneBound => {
                        ("https://api-gw.onebound.cn/taobao/item_get/", Some(("cache", "no")))
                    }
                };
                let params = [("is_promotion", "1")].into_iter().chain(more).collect();
                Defaults { url, item_param: dialect.item_param(), params, ..Defaults::default() }
            }
        }
    }
}

fn of_ali(dialect: ali1688::Dialect) -> Defaults {
    match dialect {
        ali1688::Dialect::Aop => Defaults {
            url: "https://gw.open.1688.com",
            authorise_url: "https://auth.1688.com/oauth/authorize",
            api: "com.alibaba.product/alibaba.product.get",
            version: "1",
            item_param: "productID",
            params: vec![("webSite", "1688")],
        },
        ali1688::Dialect::Router => Defaults {
            url: "https://api.1688.com/router/json",
            api: "alibaba.product.get",
            version: "1.0",
            item_param: "product_id",
            params: vec![("fields", "id,title,price,quantity,detail")],
            ..Defaults::default()
        },
        ali1688::Dialect::ItemGet => Defaults {
            url: "https://gw.api.1688.com/openapi/param2/1/alibaba.item.get/2.0",
            api: "alibaba.item.get",
            version: "2.0",
            item_param: "item_id",
            params: vec![("fields", "item_id,title,price,sku_info,category_id,seller_nick")],
            ..Defaults::default()
        },
    }
}

impl SourceConfig {
    /// Puts the kind's defaults in where nothing is said, so that what is shown is what is in effect.
    pub(super) fn fill(&mut self) {
        let Some(form) = Form::of(self.kind, self.dialect) else { return };
        let defaults = form.defaults(&self.api);
        let keys = [
            (&mut self.url, defaults.url),
            (&mut self.authorise_url, defaults.authorise_url),
            (&mut self.api, defaults.api),
            (&mut self.version, defaults.version),
            (&mut self.item_param, defaults.item_param),
        ];
        for (key, default) in keys.into_iter().filter(|(key, _)| key.is_empty()) {
            default.clone_into(key);
        }
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        self.params.get_or_insert_with(|| defaults.params.into_iter().map(owned).collect());
        self.dialect = form.dialect();
        match form {
            Form::Ali(dialect) => {
                self.columns = Some(self.columns.take().unwrap_or_default().over(dialect.pointers()).into());
            }
            Form::Top => {
                self.sign_method.get_or_insert_default();
            }
            Form::Reseller(_) => {}
        }
        if self.batch_max.is_none() {
            self.batch_max = self.ids_per_call().filter(|ids| *ids > 1);
        }
    }

    /// The most ids that the API takes in a call; `None` if there is no such API.
    fn ids_per_call(&self) -> Option<usize> {
        Some(match Form::of(self.kind, self.dialect)? {
            Form::Ali(_) => 1,
            Form::Top => taobao::Method::of_name(&self.api)?.batch_max(),
            Form::Reseller(dialect) => dialect.batch_max(),
        })
    }

    /// Whether accounts need a name that the vendor knows, beside their secret.
    #[must_use]
    pub fn needs_app_key(&self) -> bool {
        Form::of(self.kind, self.dialect) != Some(Form::Reseller(reseller::Dialect::Pool))
    }

    /// The protocol that the source speaks, set up as configured.
    ///
    /// # Errors
    /// [`Problem`] names the key, what was found and what is allowed.
    pub fn vendor(&self) -> Result<Arc<dyn Vendor>, Problem> {
        self.check_kind()?;
        let (url, item_param) = (self.url.clone(), self.item_param.clone());
        let params = self.params.clone().unwrap_or_default();
        let batch_max = self.batch_max.unwrap_or(1);
        let Some(form) = Form::of(self.kind, self.dialect) else { return Err(self.wrong_dialect()) };
        Ok(match form {
            Form::Ali(dialect) => Arc::new(Ali1688::new(ali1688::Settings {
                dialect,
                url,
                authorise_url: self.authorise_url.clone(),
                api: self.api.clone(),
                version: self.version.clone(),
                item_param,
                params,
                columns: self.columns.clone().unwrap_or_default().over(dialect.pointers()),
            })?),
            Form::Top => {
                let method = taobao::Method::of_name(&self.api).ok_or_else(|| self.wrong_method())?;
                let sign_method = self.sign_method.unwrap_or_default();
                Arc::new(Taobao::new(taobao::Settings { url, method, sign_method, item_param, params, batch_max }))
            }
            Form::Reseller(dialect) => {
                Arc::new(Reseller::new(reseller::Settings { url, dialect, item_param, params, batch_max }))
            }
        })
    }

    /// Whether the keys are the kind's, and have values that they can have.
    pub(super) fn check_kind(&self) -> Result<(), Problem> {
        let form = Form::of(self.kind, self.dialect).ok_or_else(|| self.wrong_dialect())?;
        self.check_strangers(form)?;
        let api = &self.api;
        match form {
            Form::Ali(ali1688::Dialect::Aop) => {
                let words: Vec<_> = api.split('/').collect();
                let is_api = words.len() == 2 && words.iter().all(|word| is_word(word));
                require("api", api, is_api, "namespace/name, like com.alibaba.product/alibaba.product.get")?;
            }
            Form::Ali(_) => require("api", api, is_word(api), "the API's name, like alibaba.item.get")?,
            Form::Top => require("api", api, self.ids_per_call().is_some(), METHODS)?,
            Form::Reseller(_) => {}
        }
        if matches!(form, Form::Ali(_)) {
            require("version", &self.version, is_word(&self.version), "ASCII letters, digits, - _ .")?;
        }
        require("item_param", &self.item_param, is_word(&self.item_param), "ASCII letters, digits, - _ .")?;
        let (batch_max, most) = (self.batch_max.unwrap_or(1), self.ids_per_call().unwrap_or(1));
        let is_right = (1..=most).contains(&batch_max);
        require("batch_max", &batch_max.to_string(), is_right, "from 1 to what the API takes, see weir.example.toml")
    }

    /// Keys that mean nothing to this kind are no typing errors that one would want to go unnoticed.
    fn check_strangers(&self, form: Form) -> Result<(), Problem> {
        let none = form.defaults(&self.api);
        let is_ali = matches!(form, Form::Ali(_));
        let keys = [
            ("authorise_url", none.authorise_url.is_empty() && !self.authorise_url.is_empty()),
            ("api", none.api.is_empty() && !self.api.is_empty()),
            ("version", none.version.is_empty() && !self.version.is_empty()),
            ("columns", !is_ali && self.columns.is_some()),
            ("sign_method", form != Form::Top && self.sign_method.is_some()),
        ];
        match keys.into_iter().find(|(_, is_stranger)| *is_stranger) {
            Some((key, _)) => Err(Problem::Stranger { key }),
            None => Ok(()),
        }
    }

    fn wrong_dialect(&self) -> Problem {
        let found = serde_json::to_string(&self.dialect).unwrap_or_default();
        let allowed = match self.kind {
            Kind::Ali1688 => "aop, router or item-get",
            Kind::Taobao => "left out: this kind has only one",
            Kind::TaobaoReseller => "pool or onebound",
        };
        Problem::Key { key: "dialect".to_owned(), found, allowed }
    }

    fn wrong_method(&self) -> Problem {
        Problem::Key { key: "api".to_owned(), found: format!("{:?}", self.api), allowed: METHODS }
    }
}

const METHODS: &str = "taobao.item.seller.get, taobao.items.seller.list.get, taobao.tbk.item.info.get or \
                       taobao.miniapp.items.get";

/// Parameters of every call, by name.
pub type Params = BTreeMap<String, String>;
